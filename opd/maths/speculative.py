"""Speculative sampling towards any target (arXiv 2211.17192, 2302.01318): the two decisions that make it exact.

A draft drawn from ``s`` is kept with probability ``min(1, q / s)``; after the first one that is not, a token is drawn
from ``(q - s)+``. Together that is a draw from ``q``, whatever ``s`` is; how much is kept depends on their distance.

Shape legend: R rows, K drafts in a row, V vocabulary.
"""

from __future__ import annotations

import torch


def kept_drafts(
    draft_logprobs_RK: torch.Tensor, target_logprobs_RK: torch.Tensor, uniforms_RK: torch.Tensor
) -> torch.Tensor:
    """[R] int64: how many drafts are kept before the first rejection, 0 to K.

    Args:
        draft_logprobs_RK: log s of each draft, nats.
        target_logprobs_RK: log q of it; NaN rejects it.
        uniforms_RK: in [0, 1).
    """
    log_ratio_RK = (target_logprobs_RK - draft_logprobs_RK).to(uniforms_RK.dtype)
    return (uniforms_RK.log() < log_ratio_RK).long().cumprod(-1).sum(-1)


def replacement_weights(draft_logprobs_RV: torch.Tensor, target_logprobs_RV: torch.Tensor) -> torch.Tensor:
    """[R, V] ``(q - s)+``, not normalised: what a token after a rejection is drawn from.

    Where rounding leaves nothing of it (``q`` and ``s`` agree), ``q`` itself.
    """
    target_RV = target_logprobs_RV.exp()
    excess_RV = (target_RV - draft_logprobs_RV.exp()).clamp_min(0)
    return torch.where(excess_RV.sum(-1, keepdim=True) > 0, excess_RV, target_RV)
