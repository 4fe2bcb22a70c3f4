"""Numbers of one step, as they appear in metrics.jsonl. Means are over the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from opd.config.schema import Config
from opd.config.teachers import teachers
from opd.interfaces import Trainer
from opd.rollout.driver import RolloutResult
from opd.types import SampleStatus, TokenBatch

POSITION_BUCKETS = 4  # of a response, equally long
COUNT = " tokens"  # ends the name of a sum that others are divided by


def batch_metrics(batch: TokenBatch, trainer: Trainer, *, config: Config) -> dict[str, float]:
    """Of the training batch: tokens; of the student's own answers, which a batch may lack, the entropy (nats), the gap
    between the engine's and the trainer's log-probs (nats) and the KL to the teacher (``_kl_sums``); and the share of
    samples without a teacher score, of those that should have one: the student's own, and with a distillation loss
    those of --sft-data too. Of a teacher with another tokenizer: the share of the scored answers' tokens on which the
    two could be compared.

    Where a teacher has a hand in the rollout, in place of the gap: the mean of the importance ratios student / engine
    (1 in expectation), and the effective sample size that they leave, as a share of the tokens."""
    own_N, own_T = ~batch.off_policy_N, batch.own_mask_T
    gap_T = (batch.student_logprobs_T - batch.rollout_logprobs_T).abs() * own_T
    sums = {"tokens": _sum(batch.loss_mask_T), "own": _sum(own_T), "gap": _sum(gap_T)}
    sums["student_entropy"] = _sum(batch.student_entropy_T * own_T)
    if config.written_with_teacher:
        ratio_T = _importance_ratios(batch) * own_T
        sums |= {"ratio": _sum(ratio_T), "ratio_square": _sum(ratio_T.square())}
    if config.opd.use_opd:
        expected_N = own_N if config.distillation.distillation_type is None else torch.ones_like(own_N)
        expected_N = expected_N & torch.stack([mask_L.any() for mask_L in batch.per_sample(batch.loss_mask_T)])
        sums |= {"expected": _sum(expected_N), "unscored": _sum(expected_N & ~batch.teacher_scored_N)}
        sums |= _kl_sums(batch, own_T * batch.scored_mask_T, config)
        if config.opd.opd_teacher_tokenizer is not None:
            scored_T = own_T * batch.per_token(batch.teacher_scored_N)
            sums |= {"scored": _sum(scored_T), "in_spans": _sum(scored_T * batch.scored_mask_T)}
    total = trainer.sum_over_ranks(sums, {"logprob_mismatch_max": float(gap_T.max())})
    metrics: dict[str, float] = {"tokens": int(total["tokens"])}
    if total["own"] > 0:
        if config.written_with_teacher:  # there the two differ on purpose
            metrics["importance_ratio_mean"] = total["ratio"] / total["own"]
            metrics["importance_ess_share"] = total["ratio"] ** 2 / (total["own"] * total["ratio_square"])
        else:
            metrics["logprob_mismatch_mean"] = total["gap"] / total["own"]
            metrics["logprob_mismatch_max"] = total["logprob_mismatch_max"]
        metrics["student_entropy"] = total["student_entropy"] / total["own"]
    if config.opd.use_opd and total["expected"] > 0:
        metrics["unscored_share"] = total["unscored"] / total["expected"]
    if total.get("scored", 0.0) > 0:
        metrics["teacher_coverage"] = total["in_spans"] / total["scored"]
    counts = {name: total[name] for name in sums if name.endswith(COUNT)}
    for name, count in counts.items():  # "opd_kl_k2 of opd tokens" is divided by "opd tokens"
        means = [n for n in sums if n.endswith(f" of {name}")]
        metrics |= {n.removesuffix(f" of {name}"): total[n] / count for n in means if count > 0}
    return metrics


def _kl_sums(batch: TokenBatch, mask_T: torch.Tensor, config: Config) -> dict[str, float]:
    """Sums over tokens that the student wrote and a teacher scored, named "<metric> of <count> tokens", and the counts.

    Three one-sample estimates of KL(student || teacher) in nats: k1 (``opd_reverse_kl``, unbiased, may be negative), k2
    and k3; k1 by part of the response and by teacher; and the share of tokens that --opd-kl-clip cuts.
    """
    log_ratio_T = batch.reverse_kl_T.double()
    if config.written_with_teacher:  # the teacher had a hand in the tokens: weigh it out
        mask_T = mask_T * _importance_ratios(batch)
    columns = {"opd_reverse_kl": log_ratio_T}
    columns["opd_kl_k2"] = log_ratio_T.square() / 2
    columns["opd_kl_k3"] = (-log_ratio_T).exp() - 1 + log_ratio_T
    specs = teachers(config)
    if batch.mixed_logprobs_TK is not None:
        for spec, logprobs_T in zip(specs, batch.mixed_logprobs_TK.unbind(1), strict=True):
            columns[f"teacher/{spec.name}/reverse_kl"] = batch.student_kl_logprobs_T.double() - logprobs_T
    if batch.teacher_entropy_T is not None:
        columns["teacher_entropy"] = batch.teacher_entropy_T
    if config.opd.opd_kl_clip is not None:
        columns["opd_kl_clip_fraction"] = (log_ratio_T.abs() > config.opd.opd_kl_clip).double()
    sums = {f"{name} of opd{COUNT}": _sum(values_T * mask_T) for name, values_T in columns.items()}
    sums[f"opd{COUNT}"] = _sum(mask_T)

    bucket_T = _buckets(batch)
    parts = {f"opd_reverse_kl_part_{k + 1}": bucket_T == k for k in range(POSITION_BUCKETS)}
    if len(specs) > 1 and config.opd.opd_teacher_combine == "route":
        teacher_T = batch.per_token(batch.teacher_N)
        parts |= {f"teacher/{spec.name}/reverse_kl": teacher_T == k for k, spec in enumerate(specs)}
    for name, part_T in parts.items():
        sums[f"{name} of {name}{COUNT}"] = _sum(log_ratio_T * mask_T * part_T)
        sums[f"{name}{COUNT}"] = _sum(mask_T * part_T)
    return sums


def _importance_ratios(batch: TokenBatch) -> torch.Tensor:
    """[T] float64: probability under the student over that with which the token was drawn."""
    return (batch.student_logprobs_T - batch.rollout_logprobs_T).double().exp()


def _buckets(batch: TokenBatch) -> torch.Tensor:
    """[T] int64: in which of the equal parts of its response a token lies."""
    return torch.cat([torch.arange(n) * POSITION_BUCKETS // n for n in batch.response_lengths])


def _sum(values: torch.Tensor) -> float:
    return float(values.double().sum())


def rollout_metrics(rolled: RolloutResult) -> dict[str, float]:
    """Of the student's own answers; only ``samples`` and ``off_policy_share`` tell of those of --sft-data."""
    own = [s for s in rolled.samples if not s.off_policy]
    metrics = {"samples": len(rolled.samples), **rolled.scoring}
    asked = metrics.get("teacher_cache_hits", 0) + metrics.get("teacher_cache_misses", 0)
    if asked:
        metrics["teacher_cache_share"] = metrics["teacher_cache_hits"] / asked
    if len(own) < len(rolled.samples):
        metrics["off_policy_share"] = 1 - len(own) / len(rolled.samples)
    if not own:
        return metrics
    return {
        "reward_mean": sum(s.reward for s in own) / len(own),
        "response_length_mean": sum(s.response_length for s in own) / len(own),
        "truncated_share": sum(s.status is SampleStatus.TRUNCATED for s in own) / len(own),
        "aborted_share": sum(s.status is SampleStatus.ABORTED for s in own) / len(own),
        **metrics,
    }


def idle_shares(times: Mapping[str, float], *, coloaded_teacher: bool) -> dict[str, float]:
    """Shares of the step's wall time in which the rollout engine, and the trainer, had nothing to do.

    A weight sync keeps both busy; waiting for rewards and a served teacher neither. Where the rollout runs during the
    training of the step before, its time is that of the rollout that this step learns from.

    Args:
        times: the step's ``time_*`` metrics, in seconds.
        coloaded_teacher: ``time_teacher`` is a forward pass of the trainer, not waiting for a server.
    """
    training = times["time_train"] + (times["time_teacher"] if coloaded_teacher else 0.0)
    busy = {"engine": times["time_rollout"], "trainer": training}
    step = max(times["time_step"], 1e-9)
    return {
        f"{name}_idle_share": min(1.0, max(0.0, 1 - (seconds + times["time_sync"]) / step))
        for name, seconds in busy.items()
    }


def engine_idle_shares(metrics: Mapping[str, float], step_seconds: float) -> dict[str, float]:
    """``engine_N/idle_share`` of each rollout server whose ``engine_N/busy_seconds`` is known."""
    busy = {name: seconds for name, seconds in metrics.items() if name.endswith("/busy_seconds")}
    return {
        f"{name.removesuffix('busy_seconds')}idle_share": min(1.0, max(0.0, 1 - seconds / max(step_seconds, 1e-9)))
        for name, seconds in busy.items()
    }


def saved_values(batch: TokenBatch, *, kl_coef: float) -> dict[int, dict[str, Any]]:
    """Of the saved samples of this share, by ``sample_N``: what ``report.samples`` writes of each of their tokens, by
    name. A sample without a score has nothing of a teacher."""
    known = {"student_log_probs": batch.student_kl_logprobs_T, "student_entropy": batch.student_entropy_T}
    if batch.reverse_kl_T is not None:
        known |= {"teacher_log_probs": batch.teacher_logprobs_T, "penalty": kl_coef * batch.reverse_kl_T}
        known["teacher_entropy"] = batch.teacher_entropy_T
    columns = {name: batch.per_sample(values_T) for name, values_T in known.items() if values_T is not None}
    likely = {"student_top": batch.student_likely or {}, "teacher_top": batch.teacher_likely or {}}
    saved = [False] * len(batch) if batch.saved_N is None else batch.saved_N.tolist()
    values: dict[int, dict[str, Any]] = {}
    rows = zip(batch.sample_N.tolist(), saved, batch.teacher_scored_N.tolist(), strict=True)
    for place, (sample, is_saved, scored) in enumerate(rows):
        if is_saved:
            # Copies: a view that is sent to another rank takes all of its storage along.
            found = {name: column[place].clone() for name, column in columns.items()}
            found |= {name: top[sample] for name, top in likely.items() if sample in top}
            values[sample] = {k: v for k, v in found.items() if scored or k.startswith("student_")}
    return values
