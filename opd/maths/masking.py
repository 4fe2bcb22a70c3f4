"""How tokens are weighted in a loss, so that its value does not depend on how the batch was split."""

from __future__ import annotations

import torch


def token_weights(
    loss_mask_T: torch.Tensor, response_lengths: list[int], *, per_token: bool
) -> tuple[torch.Tensor, float]:
    """Weight of each token and what the weights add up to (the denominator, before summing over ranks).

    ``per_token``: every unmasked token weighs 1. Otherwise every sample weighs 1, shared equally by its unmasked
    tokens; a sample with none weighs nothing.
    """
    if per_token:
        return loss_mask_T, float(loss_mask_T.sum())
    tokens_N = (
        torch.stack([m.sum() for m in loss_mask_T.split(response_lengths)])
        if response_lengths
        else loss_mask_T.new_zeros(0)
    )
    per_token_N = torch.where(tokens_N > 0, 1.0 / tokens_N.clamp_min(1), torch.zeros_like(tokens_N))
    weights_T = loss_mask_T * per_token_N.repeat_interleave(torch.tensor(response_lengths, device=loss_mask_T.device))
    return weights_T, float((tokens_N > 0).sum())
