import math

import pytest
import torch

from opd.maths.masking import token_weights
from opd.maths.policy_loss import clipped_policy_loss


def slow_twin(ratio: float, advantage: float, low: float, high: float) -> float:
    clipped = max(1 - low, min(1 + high, ratio))
    return -min(ratio * advantage, clipped * advantage)


def test_equals_the_formula_token_by_token():
    ratios = [0.5, 0.79, 0.9, 1.0, 1.1, 1.27, 1.29, 2.0]
    for advantage in (-1.5, 0.0, 2.0):
        logprobs = torch.tensor([math.log(r) for r in ratios], dtype=torch.float64)
        loss, _ = clipped_policy_loss(
            logprobs, torch.zeros(8, dtype=torch.float64), torch.full((8,), advantage), eps_low=0.2, eps_high=0.28
        )
        want = [slow_twin(r, advantage, 0.2, 0.28) for r in ratios]
        assert loss.tolist() == pytest.approx(want, abs=1e-12)


def test_gradient_vanishes_exactly_where_it_says_clipped():
    logprobs = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss, clipped = clipped_policy_loss(logprobs, torch.zeros(5), advantages, eps_low=0.2, eps_high=0.2)
    loss.sum().backward()
    assert clipped.tolist() == [1, 0, 0, 1, 0]
    assert [g == 0 for g in logprobs.grad.tolist()] == [True, False, False, True, False]


def test_on_policy_gradient_is_minus_advantage():
    logprobs = torch.tensor([-0.3, -2.0], requires_grad=True)
    loss, _ = clipped_policy_loss(logprobs, logprobs.detach(), torch.tensor([0.7, -0.4]), eps_low=0.2, eps_high=0.2)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.7, 0.4]))


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
