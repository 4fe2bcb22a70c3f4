"""The penalty, by hand and against the exact reverse-KL gradient of an enumerated two-token language."""

import itertools

import pytest
import torch

from opd.maths.penalty import subtract_reverse_kl
from opd.maths.policy_loss import clipped_policy_loss

VOCAB, LENGTH = 4, 3


def test_hand_worked():
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0])
    student = torch.tensor([-1.0, -2.0, -0.5, -1.0])
    teacher = torch.tensor([-3.0, -1.0, -0.5, float("nan")])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0])
    out, reverse_kl = subtract_reverse_kl(advantages, student, teacher, mask, coef=0.5)
    assert reverse_kl.tolist() == [2.0, -1.0, 0.0, 0.0]
    assert out.tolist() == [0.0, 1.5, 1.0, 1.0]


def test_clip_bounds_the_penalty_and_not_the_reported_kl():
    zeros = torch.zeros(2)
    out, reverse_kl = subtract_reverse_kl(
        zeros, torch.tensor([0.0, -9.0]), torch.tensor([-7.0, 0.0]), torch.ones(2), coef=1.0, clip=2.0
    )
    assert out.tolist() == [-2.0, 2.0]
    assert reverse_kl.tolist() == [7.0, -9.0]


def test_no_gradient_leaks_through():
    student = torch.tensor([-1.0], requires_grad=True)
    out, reverse_kl = subtract_reverse_kl(torch.zeros(1), student, torch.tensor([-2.0]), torch.ones(1), coef=1.0)
    assert not out.requires_grad and not reverse_kl.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_refuses_scores_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="1 of 2 tokens have a NaN or infinite log-prob"):
        subtract_reverse_kl(torch.zeros(2), torch.zeros(2), torch.tensor([bad, 0.0]), torch.ones(2), coef=1.0)


def test_refuses_misaligned_lengths():
    with pytest.raises(ValueError, match="one shape"):
        subtract_reverse_kl(torch.zeros(2), torch.zeros(2), torch.zeros(3), torch.ones(2), coef=1.0)


def prefixes():
    return [p for n in range(LENGTH) for p in itertools.product(range(VOCAB), repeat=n)]


def test_expected_gradient_is_the_exact_reverse_kl_gradient():
    """Every prefix has its own softmax. Weighted by their probability under the student, all sequences together give
    the gradient of sum over prefixes of P(prefix) * KL(student || teacher | prefix), P held fixed: below 1e-12."""
    torch.manual_seed(3)
    row_of = {prefix: i for i, prefix in enumerate(prefixes())}
    logits = torch.randn(len(row_of), VOCAB, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(len(row_of), VOCAB, dtype=torch.float64).log_softmax(-1)
    coef = 0.7

    student = logits.log_softmax(-1)
    loss = 0.0
    for sequence in itertools.product(range(VOCAB), repeat=LENGTH):
        rows = torch.tensor([row_of[sequence[:t]] for t in range(LENGTH)])
        ids = torch.tensor(sequence)
        logprobs = student[rows, ids]
        probability = logprobs.sum().exp().detach()
        advantages, _ = subtract_reverse_kl(
            torch.zeros(LENGTH, dtype=torch.float64), logprobs, teacher[rows, ids], torch.ones(LENGTH), coef=coef
        )
        token_loss, _ = clipped_policy_loss(logprobs, logprobs.detach(), advantages, eps_low=0.2, eps_high=0.2)
        loss = loss + probability * token_loss.sum()
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)

    exact = 0.0
    for prefix, row in row_of.items():
        rows = [row_of[prefix[:t]] for t in range(len(prefix))]
        reach = (
            sum((student[r, a] for r, a in zip(rows, prefix, strict=True)), torch.zeros((), dtype=torch.float64))
            .exp()
            .detach()
        )
        exact = exact + reach * coef * (student[row].exp() * (student[row] - teacher[row])).sum()
    (want,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert want.abs().max() > 1e-2
