"""PPO's clipped surrogate (arXiv 1707.06347) per token, with separate lower and upper clips (arXiv 2503.14476)."""

from __future__ import annotations

import torch


def clipped_policy_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    eps_low: float,
    eps_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``-min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A)`` with ``ratio = exp(logprobs - old_logprobs)``.

    Returns:
        (loss_T, clipped_T): ``clipped_T`` is 1.0 where the clip took the gradient away.
    """
    ratio_T = (logprobs_T - old_logprobs_T.detach()).exp()
    advantages_T = advantages_T.detach()
    unclipped_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1 - eps_low, 1 + eps_high) * advantages_T
    return -torch.minimum(unclipped_T, clipped_T), (clipped_T < unclipped_T).to(logprobs_T.dtype).detach()
