import pytest
import torch

from opd.maths.advantages import group_relative, reward_to_go, token_rewards, whiten


def test_hand_worked_group():
    # rewards 1, 0, 0, 1: mean 0.5, sample deviation sqrt(1/3) = 0.57735
    got = group_relative(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(got, torch.tensor([0.866025, -0.866025, -0.866025, 0.866025]), atol=1e-5, rtol=0)


def test_equals_a_loop_over_groups_in_any_order():
    torch.manual_seed(0)
    rewards = torch.rand(30, dtype=torch.float64)
    groups = torch.randint(0, 5, (30,)) * 7
    got = group_relative(rewards, groups)
    for i in range(30):
        members = rewards[groups == groups[i]]
        want = (rewards[i] - members.mean()) / (members.std() + 1e-6)
        assert got[i] == pytest.approx(want.item(), abs=1e-12)


def test_without_deviation():
    got = group_relative(torch.tensor([3.0, 1.0, 5.0]), torch.tensor([0, 0, 1]), normalize_std=False)
    assert got.tolist() == [1.0, -1.0, 0.0]


def test_group_of_one_and_equal_rewards_teach_nothing():
    assert group_relative(torch.tensor([4.0, 2.0, 2.0]), torch.tensor([0, 1, 1])).tolist() == [0.0, 0.0, 0.0]


def test_whiten_ignores_masked_tokens():
    values = torch.tensor([1.0, 2.0, 3.0, 1e9, float("nan")])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(whiten(values, mask), torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0]), atol=1e-5, rtol=0)


def test_refuses_lengths_that_differ():
    with pytest.raises(ValueError, match="rewards for"):
        group_relative(torch.zeros(2), torch.zeros(3))


def test_token_rewards_by_hand():
    logprobs, reference = torch.tensor([-1.0, -1.0, -1.0, -1.0]), torch.tensor([-2.0, -0.5, float("nan"), -1.0])
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0])
    got = token_rewards(torch.tensor([3.0, 5.0]), logprobs, reference, mask, [3, 1], kl_coef=0.5)
    assert got.tolist() == [-0.5, 0.25 + 3.0, 0.0, 5.0]
    without = token_rewards(torch.tensor([3.0, 5.0]), logprobs, None, mask, [3, 1], kl_coef=0.0)
    assert without.tolist() == [0.0, 3.0, 0.0, 5.0]


def test_a_sample_without_unmasked_tokens_has_no_place_for_its_reward():
    got = token_rewards(
        torch.tensor([3.0, 5.0]), torch.zeros(3), None, torch.tensor([0.0, 0.0, 1.0]), [2, 1], kl_coef=0
    )
    assert got.tolist() == [0.0, 0.0, 5.0]


def test_reward_to_go_by_hand():
    got = reward_to_go(torch.tensor([1.0, 0.0, 4.0, 8.0]), torch.ones(4), [3, 1], gamma=0.5)
    assert got.tolist() == [2.0, 2.0, 4.0, 8.0]
