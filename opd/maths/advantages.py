"""Rewards -> advantages: relative to the group, as reward to go, and whitening. PPO's are in ``gae.py``.

Shape legend: N samples, G groups, T response tokens of all samples.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from opd.maths.discount import discounted_sums

_EPS = 1e-6


def group_relative(rewards_N: torch.Tensor, group_ids_N: torch.Tensor, *, normalize_std: bool = True) -> torch.Tensor:
    """GRPO (arXiv 2402.03300): reward minus its group's mean, divided by (standard deviation + 1e-6) if asked.

    The deviation is the sample's (n - 1); a group of one, or of equal rewards, gets advantages of 0.
    """
    if rewards_N.shape != group_ids_N.shape:
        raise ValueError(f"{tuple(rewards_N.shape)} rewards for {tuple(group_ids_N.shape)} group ids")
    _, group_N = torch.unique(group_ids_N, return_inverse=True)
    groups = int(group_N.max()) + 1 if group_N.numel() else 0
    size_G = torch.zeros(groups, dtype=rewards_N.dtype).index_add_(0, group_N, torch.ones_like(rewards_N))
    mean_G = torch.zeros(groups, dtype=rewards_N.dtype).index_add_(0, group_N, rewards_N) / size_G
    centred_N = rewards_N - mean_G[group_N]
    if not normalize_std:
        return centred_N
    square_G = torch.zeros(groups, dtype=rewards_N.dtype).index_add_(0, group_N, centred_N.square())
    std_G = (square_G / (size_G - 1).clamp_min(1)).sqrt()
    return centred_N / (std_G[group_N] + _EPS)


def token_rewards(
    rewards_N: torch.Tensor,
    logprobs_T: torch.Tensor,
    ref_logprobs_T: torch.Tensor | None,
    loss_mask_T: torch.Tensor,
    response_lengths: list[int],
    *,
    kl_coef: float,
) -> torch.Tensor:
    """The reward at each sample's last unmasked token, and ``-kl_coef * (log s - log ref)`` at every unmasked one.

    Both log-probs at the same temperature. Added up, the KL terms are a one-sample estimate of the KL(student ||
    reference) of whole answers, so a policy gradient on these rewards follows ``E[R] - kl_coef * KL``. Without
    ``ref_logprobs_T`` there is no KL term.
    """
    written_T = loss_mask_T != 0
    rewards_T = torch.zeros_like(logprobs_T)
    if ref_logprobs_T is not None:
        rewards_T[written_T] = -kl_coef * (logprobs_T - ref_logprobs_T).detach()[written_T]
    start = 0
    for reward, length in zip(rewards_N.tolist(), response_lengths, strict=True):
        places = written_T[start : start + length].nonzero()
        if len(places):
            rewards_T[start + int(places[-1])] += reward
        start += length
    return rewards_T


def reward_to_go(
    rewards_T: torch.Tensor, loss_mask_T: torch.Tensor, response_lengths: list[int], *, gamma: float
) -> torch.Tensor:
    """REINFORCE++ (arXiv 2501.03262) before its whitening: the discounted rewards from each token on; masked: 0."""
    return discounted_sums(rewards_T, response_lengths, discount=gamma, mask_T=loss_mask_T)


def whiten(values_T: torch.Tensor, mask_T: torch.Tensor, *, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Zero mean and unit deviation over the unmasked tokens of all ranks of ``group``; masked tokens become 0."""
    counts_T = (mask_T != 0).to(values_T.dtype)
    clean_T = torch.where(mask_T != 0, values_T, torch.zeros_like(values_T))
    sums = torch.stack([clean_T.sum(), counts_T.sum()]).double()
    _sum_over(sums, group)
    mean = sums[0] / sums[1].clamp_min(1)
    square = ((clean_T - mean).double().square() * counts_T).sum()
    _sum_over(square, group)
    std = (square / (sums[1] - 1).clamp_min(1)).sqrt()
    return ((clean_T - mean) / (std + _EPS) * counts_T).to(values_T.dtype)


def _sum_over(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """In place; NCCL adds up on the device alone."""
    if group is None:
        return
    moved = tensor.cuda() if dist.get_backend(group) == dist.Backend.NCCL else tensor
    dist.all_reduce(moved, group=group)
    tensor.copy_(moved)
