"""--async-ratio-gate: which tokens the policy loss may learn from, and how many it leaves out."""

from __future__ import annotations

import torch

from opd.config.schema import Config
from opd.interfaces import Trainer
from opd.maths.importance import ratio_gate
from opd.types import TokenBatch


def gate_mask(batch: TokenBatch, config: Config) -> torch.Tensor:
    """[T]: 1 for tokens that the policy loss may learn from: the student's own, within --async-ratio-gate."""
    own_T = batch.own_mask_T
    bounds = config.rollout.async_ratio_gate
    if bounds is None:
        return own_T
    low, high = bounds
    return own_T * ratio_gate(batch.student_logprobs_T, batch.rollout_logprobs_T, low=low, high=high)


def gate_metrics(batch: TokenBatch, trainer: Trainer, *, config: Config) -> dict[str, float]:
    """``gated_share``: of the student's own tokens, over the global batch, those outside --async-ratio-gate."""
    if config.rollout.async_ratio_gate is None:
        return {}
    own, kept = float(batch.own_mask_T.sum()), float(gate_mask(batch, config).sum())
    total = trainer.sum_over_ranks({"own": own, "gated": own - kept}, {})
    return {"gated_share": total["gated"] / total["own"]} if total["own"] > 0 else {}
