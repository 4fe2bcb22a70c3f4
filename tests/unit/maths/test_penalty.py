"""The penalty, by hand and against the exact reverse-KL gradients of an enumerated language."""

import pytest
import torch

from opd.maths.penalty import subtract_reverse_kl
from opd.maths.policy_loss import policy_loss
from tests.unit.maths import enumerated


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


def test_a_coefficient_per_token():
    coef = torch.tensor([0.5, 2.0])
    out, _ = subtract_reverse_kl(torch.zeros(2), torch.zeros(2), -torch.ones(2), torch.ones(2), coef=coef)
    assert out.tolist() == [-0.5, -2.0]


def test_discounted_within_the_sample_and_over_unmasked_tokens():
    student = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    teacher = torch.tensor([-2.0, -5.0, float("nan"), -1.5, -3.0, -1.0])
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    out, reverse_kl = subtract_reverse_kl(
        torch.zeros(6), student, teacher, mask, coef=2.0, discount=0.5, response_lengths=[4, 2]
    )
    assert reverse_kl.tolist() == [1.0, 4.0, 0.0, 0.5, 2.0, 0.0]
    penalties = [1 + 4 / 2 + 0.5 / 4, 4 + 0.5 / 2, 0, 0.5, 2, 0]  # the masked token takes no time
    assert out.tolist() == [-2 * p for p in penalties]


def test_clips_each_token_before_it_is_discounted():
    out, _ = subtract_reverse_kl(
        torch.zeros(3),
        torch.zeros(3),
        torch.tensor([-1.0, -9.0, -9.0]),
        torch.ones(3),
        coef=1.0,
        clip=2.0,
        discount=1.0,
        response_lengths=[3],
    )
    assert out.tolist() == [-5.0, -4.0, -2.0]


def test_a_discount_needs_to_know_where_samples_end():
    with pytest.raises(ValueError, match="discount=0.5 needs response_lengths"):
        subtract_reverse_kl(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.ones(2), coef=1.0, discount=0.5)


def expected_gradient(student: torch.Tensor, teacher: torch.Tensor, *, coef: float, discount: float) -> torch.Tensor:
    """Of minus the policy loss, on the penalty alone."""
    logprobs_T = enumerated.token_logprobs(student)
    zeros_T = torch.zeros_like(logprobs_T)
    advantages_T, _ = subtract_reverse_kl(
        zeros_T,
        logprobs_T,
        enumerated.token_logprobs(teacher),
        torch.ones_like(zeros_T),
        coef=coef,
        discount=discount,
        response_lengths=enumerated.LENGTHS,
    )
    loss_T, _ = policy_loss(logprobs_T, logprobs_T.detach(), advantages_T, kind="ppo", eps_low=0.2, eps_high=0.2)
    return -enumerated.gradient(enumerated.expected(loss_T, student), student)


def test_expected_gradient_is_that_of_the_reverse_kl_per_token():
    """Of sum over prefixes of P(prefix) * KL(student || teacher | prefix), with P held fixed."""
    student, teacher = enumerated.student(), enumerated.logits(2)
    exact = (enumerated.reach(student) * enumerated.kl_of_rows(student, teacher)).sum()
    want = enumerated.gradient(-0.7 * exact, student)
    enumerated.assert_same_gradient(expected_gradient(student, teacher, coef=0.7, discount=0.0), want)


def test_undiscounted_it_is_that_of_the_reverse_kl_of_answers():
    student, teacher = enumerated.student(), enumerated.logits(2)
    want = enumerated.gradient(-0.7 * enumerated.kl_of_answers(student, teacher), student)
    enumerated.assert_same_gradient(expected_gradient(student, teacher, coef=0.7, discount=1.0), want)
    per_token = expected_gradient(student, teacher, coef=0.7, discount=0.0)
    assert (per_token - want).abs().max() > 1e-2, "the two objectives differ"


def test_the_penalty_back_propagated_instead_would_not_know_the_teacher():
    """Why it is an advantage and no loss."""
    student = enumerated.student()
    for seed in (2, 3):
        difference_T = enumerated.token_logprobs(student) - enumerated.token_logprobs(enumerated.logits(seed))
        assert enumerated.gradient(enumerated.expected(difference_T, student), student).abs().max() < 1e-12
