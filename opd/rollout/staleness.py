"""How old the weights were that wrote what a step learns from, and how much of the writing was waited for."""

from __future__ import annotations

from opd.rollout.ahead import Taken
from opd.rollout.driver import RolloutResult
from opd.types import Sample


def staleness_metrics(rolled: RolloutResult, *, step: int) -> dict[str, float]:
    """``staleness_mean`` and ``staleness_max`` over the tokens of the student's own samples, in rollouts: 0 for
    a token of the weights that the update of ``step`` starts from, 1 for those of the step before, and so on."""
    weighted = [(step - 1 - version, tokens) for sample in rolled.samples for version, tokens in _versions(sample)]
    if not weighted:
        return {}
    tokens = sum(count for _, count in weighted)
    return {
        "staleness_mean": sum(age * count for age, count in weighted) / tokens,
        "staleness_max": float(max(age for age, _ in weighted)),
    }


def _versions(sample: Sample) -> list[tuple[int, int]]:
    """(version, tokens) of each stretch of the response that the same weights wrote."""
    if sample.off_policy or not sample.trainable or sample.weight_version is None:
        return []
    spans = sample.weight_spans or [(0, sample.weight_version)]
    ends = [start for start, _ in spans[1:]] + [sample.response_length]
    return [(version, end - start) for (start, version), end in zip(spans, ends, strict=True)]


def overlap_metrics(taken: Taken[RolloutResult | None]) -> dict[str, float]:
    """Seconds that the step waited for its rollout, and the share of the rollout's time that hid behind training."""
    return {"time_rollout_wait": taken.seconds_waited, "rollout_overlap_share": taken.overlap_share}
