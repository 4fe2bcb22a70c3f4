"""The critic's loss, per token."""

from __future__ import annotations

import torch


def value_loss(
    values_T: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, *, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped regression: ``max((V - R)^2, (V_clipped - R)^2) / 2``, V_clipped within ``clip`` of the old V.

    ``returns_T`` is what the values before this rollout's updates plus their advantages came to, in units of reward.

    Returns:
        (loss_T, clipped_T): ``clipped_T`` is 1.0 where V has already moved ``clip`` towards R, so that its gradient
        is cut.
    """
    old_values_T, returns_T = old_values_T.detach(), returns_T.detach()
    near_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
    unclipped_T, clipped_T = (values_T - returns_T).square(), (near_T - returns_T).square()
    return torch.maximum(unclipped_T, clipped_T) / 2, (clipped_T > unclipped_T).to(values_T.dtype).detach()
