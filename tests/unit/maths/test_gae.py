"""Advantage estimation by hand, against its definition, and the policy gradient it gives."""

import pytest
import torch

from opd.maths.gae import gae, gae_of_samples
from tests.unit.maths import enumerated


def slow_twin(rewards, values, gamma, lam):
    """The definition, term by term."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    advantages = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def test_hand_worked():
    advantages, returns = gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25]), gamma=0.5, lam=0.5)
    # deltas: 0 + 0.5 * 0.25 - 0.5 = -0.375 and 1 - 0.25 = 0.75
    assert advantages.tolist() == [-0.375 + 0.25 * 0.75, 0.75]
    assert returns.tolist() == [0.3125, 1.0]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.5, 1.0)])
def test_equals_the_definition(gamma, lam):
    torch.manual_seed(0)
    rewards, values = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lam)
    want_advantages, want_returns = slow_twin(rewards.tolist(), values.tolist(), gamma, lam)
    assert advantages.tolist() == pytest.approx(want_advantages, abs=1e-12)
    assert returns.tolist() == pytest.approx(want_returns, abs=1e-12)


def test_each_sample_by_itself_and_masked_tokens_as_if_absent():
    torch.manual_seed(0)
    rewards, values = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 0, 0, 1, 1, 1, 0], dtype=torch.float64)
    advantages, returns = gae_of_samples(rewards, values, mask, [3, 2, 4], gamma=0.9, lam=0.8)
    for kept in ([0, 2], [5, 6, 7]):
        want = gae(rewards[kept], values[kept], gamma=0.9, lam=0.8)
        torch.testing.assert_close(advantages[kept], want[0])
        torch.testing.assert_close(returns[kept], want[1])
    for masked in (1, 3, 4, 8):
        assert advantages[masked] == 0 and returns[masked] == 0


def test_no_gradient_reaches_the_critic():
    values = torch.zeros(2, requires_grad=True)
    advantages, returns = gae(torch.ones(2), values, gamma=1.0, lam=1.0)
    assert not advantages.requires_grad and not returns.requires_grad


def test_refuses_misaligned_lengths():
    with pytest.raises(ValueError, match="one shape"):
        gae(torch.zeros(2), torch.zeros(3), gamma=1.0, lam=1.0)


def expected_gradient(student, values_P, lam):
    """Of the policy gradient with the answer's reward at its last token and ``values_P`` before each."""
    logprobs_T = enumerated.token_logprobs(student)
    ends = torch.tensor(enumerated.LENGTHS).cumsum(0) - 1
    rewards_T = torch.zeros_like(logprobs_T).detach()
    rewards_T[ends] = enumerated.rewards()
    advantages_T, _ = gae_of_samples(
        rewards_T, values_P[enumerated.ROW_T], torch.ones_like(rewards_T), enumerated.LENGTHS, gamma=1.0, lam=lam
    )
    return enumerated.gradient(enumerated.expected(advantages_T * logprobs_T, student), student)


def true_values(student):
    """[prefixes] the reward to expect from there on."""
    probability_N, rewards_N = enumerated.probabilities(student).detach(), enumerated.rewards()
    reach_P, values = enumerated.reach(student), []
    for prefix, reach in zip(enumerated.PREFIXES, reach_P, strict=True):
        inside = enumerated.continues(prefix)
        values.append((probability_N[inside] * rewards_N[inside]).sum() / reach)
    return torch.stack(values)


def test_with_lambda_1_any_critic_gives_the_policy_gradient():
    student = enumerated.student()
    want = enumerated.gradient((enumerated.probabilities(student) * enumerated.rewards()).sum(), student)
    for seed in (7, 8):
        values_P = enumerated.logits(seed)[:, 0]
        enumerated.assert_same_gradient(expected_gradient(student, values_P, lam=1.0), want)


def test_with_a_lower_lambda_only_a_right_critic_does():
    student = enumerated.student()
    want = enumerated.gradient((enumerated.probabilities(student) * enumerated.rewards()).sum(), student)
    for lam in (0.0, 0.5):
        enumerated.assert_same_gradient(expected_gradient(student, true_values(student), lam=lam), want)
        wrong = expected_gradient(student, enumerated.logits(7)[:, 0], lam=lam)
        assert (wrong - want).abs().max() > 1e-2
