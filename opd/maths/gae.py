"""Generalised advantage estimation (arXiv 1506.02438), for PPO's critic."""

from __future__ import annotations

import torch

from opd.maths.discount import discounted_sums


def gae(
    rewards_T: torch.Tensor, values_T: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns of one sequence that ends with its last token: the value after it is 0.

    ``delta_t = r_t + gamma * V_{t+1} - V_t``, ``A_t = sum_k (gamma * lam)^k * delta_{t+k}``, ``returns = A + V``.
    ``values_T[t]`` is the critic's estimate before token t is written. With gamma = lam = 1, ``A_t`` is the reward
    still to come minus ``V_t``: an unbiased policy gradient whatever the critic says. A lower lam trusts the critic:
    less variance, and a bias unless its values are right.

    Returns:
        (advantages_T, returns_T), without gradient.

    Raises:
        ValueError: lengths differ, or ``gamma * lam`` is not in [0, 1].
    """
    return gae_of_samples(rewards_T, values_T, torch.ones_like(rewards_T), [len(rewards_T)], gamma=gamma, lam=lam)


def gae_of_samples(
    rewards_T: torch.Tensor,
    values_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    response_lengths: list[int],
    *,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gae`` of each sample. Masked tokens are left out as if they were not there, and get 0 and 0.

    Raises:
        ValueError: as ``gae``.
    """
    if not rewards_T.shape == values_T.shape == loss_mask_T.shape:
        shapes = [tuple(t.shape) for t in (rewards_T, values_T, loss_mask_T)]
        raise ValueError(f"rewards, values and mask must have one shape, got {shapes}")
    written_T = loss_mask_T != 0
    written_N = [int(part.sum()) for part in written_T.split(response_lengths)]
    rewards_W, values_W = rewards_T.detach()[written_T], values_T.detach()[written_T]
    next_values_W = torch.zeros_like(values_W)
    next_values_W[:-1] = values_W[1:]
    last_W = torch.tensor(written_N).cumsum(0) - 1
    next_values_W[last_W[torch.tensor(written_N) > 0]] = 0
    deltas_W = rewards_W + gamma * next_values_W - values_W
    advantages_W = discounted_sums(deltas_W, written_N, discount=gamma * lam)
    advantages_T, returns_T = torch.zeros_like(rewards_T), torch.zeros_like(rewards_T)
    advantages_T[written_T] = advantages_W
    returns_T[written_T] = advantages_W + values_W
    return advantages_T, returns_T
