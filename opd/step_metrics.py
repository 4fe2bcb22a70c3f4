"""Numbers of one step, as they appear in metrics.jsonl. Means are over the global batch."""

from __future__ import annotations

from typing import Any

import torch

from opd.interfaces import Trainer
from opd.rollout.driver import RolloutResult
from opd.types import Sample, SampleStatus, TokenBatch


def batch_metrics(batch: TokenBatch, trainer: Trainer, *, use_opd: bool) -> dict[str, float]:
    """Of the training batch: reverse KL (nats per scored token), the gap between the engine's and the trainer's
    log-probs (nats), tokens, and the share of samples without a teacher score."""
    gap_T = (batch.student_logprobs_T - batch.rollout_logprobs_T).abs() * batch.loss_mask_T
    sums = {"tokens": float(batch.loss_mask_T.sum()), "samples": float(len(batch)), "gap": float(gap_T.double().sum())}
    maxima = {"logprob_mismatch_max": float(gap_T.max())}
    if use_opd:
        scored_T = batch.teacher_scored_N.repeat_interleave(torch.tensor(batch.response_lengths)) * batch.loss_mask_T
        sums["scored_tokens"] = float(scored_T.sum())
        sums["reverse_kl"] = float(batch.reverse_kl_T.double().sum())
        sums["unscored"] = float((~batch.teacher_scored_N).sum())
    total = trainer.sum_over_ranks(sums, maxima)
    metrics = {
        "tokens": int(total["tokens"]),
        "logprob_mismatch_mean": total["gap"] / max(total["tokens"], 1),
        "logprob_mismatch_max": total["logprob_mismatch_max"],
    }
    if use_opd:
        metrics["opd_reverse_kl"] = total["reverse_kl"] / max(total["scored_tokens"], 1)
        metrics["unscored_share"] = total["unscored"] / max(total["samples"], 1)
    return metrics


def rollout_metrics(rolled: RolloutResult) -> dict[str, float]:
    samples = rolled.samples
    return {
        "reward_mean": sum(s.reward for s in samples) / len(samples),
        "response_length_mean": sum(s.response_length for s in samples) / len(samples),
        "truncated_share": sum(s.status is SampleStatus.TRUNCATED for s in samples) / len(samples),
        "aborted_share": sum(s.status is SampleStatus.ABORTED for s in samples) / len(samples),
        **{f"teacher_{name}": value for name, value in rolled.scoring.items()},
    }


def per_sample_values(batch: TokenBatch, samples: list[Sample], *, kl_coef: float) -> dict[str, list[Any]]:
    """Per-token lists by position in ``samples``, for ``report.samples``; None for a sample of another rank's share."""
    columns = {"student_log_probs": batch.student_kl_logprobs_T}
    if batch.reverse_kl_T is not None:
        columns |= {"teacher_log_probs": batch.teacher_logprobs_T, "penalties": kl_coef * batch.reverse_kl_T}
    values: dict[str, list[Any]] = {name: [None] * len(samples) for name in columns}
    for name, values_T in columns.items():
        rows = zip(batch.sample_N.tolist(), batch.teacher_scored_N.tolist(), batch.per_sample(values_T), strict=True)
        for position, scored, chunk in rows:
            if scored or name == "student_log_probs":
                values[name][position] = chunk.tolist()
    return values
