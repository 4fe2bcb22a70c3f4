"""Truncated importance weights: by hand, and what they correct."""

import math

import torch

from opd.maths.importance import truncated_importance_weights


def test_hand_worked():
    trainer = torch.tensor([0.0, math.log(3.0), math.log(0.1)], requires_grad=True)
    weights, truncated = truncated_importance_weights(trainer, torch.zeros(3), low=0.5, high=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 0.5]))
    assert truncated.tolist() == [0, 1, 1]
    assert not weights.requires_grad


def test_finite_whatever_the_ratio():
    weights, truncated = truncated_importance_weights(torch.tensor([0.0]), torch.tensor([-500.0]), low=0.0, high=2.0)
    assert weights.tolist() == [2.0] and truncated.tolist() == [1.0]


def test_untruncated_weights_make_a_rollout_policys_tokens_the_trainers():
    """Expected under another policy the weighted gradient is the exact one under the trainer's; without, it is not."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    rollout = torch.randn(5, dtype=torch.float64).log_softmax(-1)
    advantages = torch.randn(5, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    weights, _ = truncated_importance_weights(logprobs, rollout, low=0.0, high=1e9)
    (got,) = torch.autograd.grad((rollout.exp() * weights * advantages * logprobs).sum(), logits, retain_graph=True)
    (plain,) = torch.autograd.grad((rollout.exp() * advantages * logprobs).sum(), logits, retain_graph=True)
    (want,) = torch.autograd.grad((logprobs.exp() * advantages).sum(), logits)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert (plain - want).abs().max() > 1e-2
