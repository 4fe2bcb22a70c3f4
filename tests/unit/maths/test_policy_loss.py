"""Policy losses: by hand, where their gradients vanish, and what they equal off-policy. On-policy gradients against
the exact ones are in tests/unit/test_signal_gradients.py."""

import math
from functools import partial

import pytest
import torch

from opd.maths.masking import token_weights
from opd.maths.policy_loss import policy_loss

ppo = partial(policy_loss, kind="ppo")
gspo = partial(policy_loss, kind="gspo", eps_low=0.2, eps_high=0.2)
cispo = partial(policy_loss, kind="cispo")


def slow_twin(ratio: float, advantage: float, low: float, high: float) -> float:
    clipped = max(1 - low, min(1 + high, ratio))
    return -min(ratio * advantage, clipped * advantage)


def test_equals_the_formula_token_by_token():
    ratios = [0.5, 0.79, 0.9, 1.0, 1.1, 1.27, 1.29, 2.0]
    for advantage in (-1.5, 0.0, 2.0):
        logprobs = torch.tensor([math.log(r) for r in ratios], dtype=torch.float64)
        loss, _ = ppo(
            logprobs, torch.zeros(8, dtype=torch.float64), torch.full((8,), advantage), eps_low=0.2, eps_high=0.28
        )
        want = [slow_twin(r, advantage, 0.2, 0.28) for r in ratios]
        assert loss.tolist() == pytest.approx(want, abs=1e-12)


def test_gradient_vanishes_exactly_where_it_says_clipped():
    logprobs = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss, clipped = ppo(logprobs, torch.zeros(5), advantages, eps_low=0.2, eps_high=0.2)
    loss.sum().backward()
    assert clipped.tolist() == [1, 0, 0, 1, 0]
    assert [g == 0 for g in logprobs.grad.tolist()] == [True, False, False, True, False]


def test_on_policy_gradient_is_minus_advantage():
    logprobs = torch.tensor([-0.3, -2.0], requires_grad=True)
    loss, _ = ppo(logprobs, logprobs.detach(), torch.tensor([0.7, -0.4]), eps_low=0.2, eps_high=0.2)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.7, 0.4]))


def test_dual_clip_bounds_a_negative_advantage():
    ratios = [0.5, 1.0, 2.9, 3.1, 50.0, 50.0]
    logprobs = torch.tensor([math.log(r) for r in ratios], requires_grad=True)
    advantages = torch.tensor([-1.0, -1.0, -1.0, -1.0, -2.0, 2.0])
    loss, clipped = ppo(logprobs, torch.zeros(6), advantages, eps_low=0.2, eps_high=0.2, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([0.8, 1.0, 2.9, 3.0, 6.0, -2.4]))
    assert clipped.tolist() == [1, 0, 0, 1, 1, 1]
    loss.sum().backward()
    assert [g == 0 for g in logprobs.grad.tolist()] == [True, False, False, True, True, True]


def test_finite_whatever_the_ratio():
    logprobs = torch.zeros(3, requires_grad=True)
    loss, clipped = ppo(logprobs, torch.full((3,), -500.0), torch.tensor([0.0, 1.0, -1.0]), eps_low=0.2, eps_high=0.2)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and clipped.tolist() == [0, 1, 1]
    assert logprobs.grad.tolist() == [0, 0, 0]


def test_gspo_tokens_have_the_value_and_the_gradient_of_the_sequence_ratio():
    torch.manual_seed(0)
    old = torch.randn(5, dtype=torch.float64)
    logprobs = (old + 0.05 * torch.randn(5, dtype=torch.float64)).requires_grad_()
    ratio = (logprobs - old).mean().exp()
    sequence_log_ratio = (logprobs - old).mean().detach().expand(5)
    loss, _ = gspo(logprobs, old, torch.full((5,), 1.7, dtype=torch.float64), sequence_log_ratio_T=sequence_log_ratio)
    torch.testing.assert_close(loss, (-1.7 * ratio).detach().expand(5))
    (got,) = torch.autograd.grad(loss.mean(), logprobs, retain_graph=True)
    (want,) = torch.autograd.grad(-1.7 * ratio, logprobs)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_gspo_clips_the_answer_and_not_its_tokens():
    logprobs = torch.tensor([1.0, -0.9, 2.0, 0.0], requires_grad=True)  # mean 0.05, and 1.0
    sequence_log_ratio = torch.tensor([0.05, 0.05, 1.0, 1.0])
    loss, clipped = gspo(logprobs, torch.zeros(4), torch.ones(4), sequence_log_ratio_T=sequence_log_ratio)
    loss.sum().backward()
    assert clipped.tolist() == [0, 0, 1, 1]
    assert [g == 0 for g in logprobs.grad.tolist()] == [False, False, True, True]


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    logprobs = torch.tensor([math.log(r) for r in (0.5, 1.0, 2.0)], requires_grad=True)
    loss, clipped = cispo(logprobs, torch.zeros(3), torch.tensor([1.0, 2.0, -3.0]), eps_low=0.2, eps_high=0.3)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.8, -2.0, 3.9]))
    assert clipped.tolist() == [1, 0, 1]


@pytest.mark.parametrize("loss", [ppo, cispo])
def test_unclipped_the_old_policys_tokens_give_the_new_policys_gradient(loss):
    """One token, all choices: expected under the old policy, the gradient of E_new[A]."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    old = torch.randn(5, dtype=torch.float64).log_softmax(-1)
    advantages = torch.randn(5, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    loss_T, clipped_T = loss(logprobs, old, advantages, eps_low=1.0, eps_high=1e6)
    (got,) = torch.autograd.grad((old.exp() * loss_T).sum(), logits, retain_graph=True)
    (want,) = torch.autograd.grad(-(logprobs.exp() * advantages).sum(), logits)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert want.abs().max() > 1e-2 and clipped_T.sum() == 0


def test_arguments_of_another_kind():
    zeros = torch.zeros(1)
    with pytest.raises(ValueError, match="gspo needs it"):
        gspo(zeros, zeros, zeros)
    with pytest.raises(ValueError, match="sequence_log_ratio_T is for gspo"):
        ppo(zeros, zeros, zeros, eps_low=0.2, eps_high=0.2, sequence_log_ratio_T=zeros)
    with pytest.raises(ValueError, match="dual_clip=3.0 is for ppo"):
        cispo(zeros, zeros, zeros, eps_low=0.2, eps_high=0.2, dual_clip=3.0)
    with pytest.raises(ValueError, match="'trpo' is no policy loss: give ppo, gspo or cispo"):
        policy_loss(zeros, zeros, zeros, kind="trpo", eps_low=0.2, eps_high=0.2)


def test_token_weights_by_sample():
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    weights, total = token_weights(mask, [3, 1, 1], per_token=False)
    assert weights.tolist() == [0.5, 0.5, 0.0, 1.0, 0.0]
    assert total == 2.0


def test_token_weights_by_token():
    mask = torch.tensor([1.0, 1.0, 0.0])
    weights, total = token_weights(mask, [2, 1], per_token=True)
    assert weights.tolist() == mask.tolist() and total == 2.0


@pytest.mark.parametrize("per_token", [True, False])
def test_loss_does_not_depend_on_how_the_batch_is_split(per_token):
    torch.manual_seed(0)
    lengths = [3, 5, 1, 4]
    values, mask = torch.randn(13), (torch.rand(13) > 0.3).float()
    weights, total = token_weights(mask, lengths, per_token=per_token)
    whole = (values * weights).sum() / total
    parts = [
        token_weights(mask[:8], lengths[:2], per_token=per_token),
        token_weights(mask[8:], lengths[2:], per_token=per_token),
    ]
    split = ((values[:8] * parts[0][0]).sum() + (values[8:] * parts[1][0]).sum()) / (parts[0][1] + parts[1][1])
    torch.testing.assert_close(whole, split)
