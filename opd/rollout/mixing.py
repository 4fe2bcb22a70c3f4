"""Puts the student's own answers and those of --sft-data into one rollout."""

from __future__ import annotations

from collections.abc import Callable
from operator import add

from opd.rollout.driver import RolloutResult
from opd.types import Sample

NOTHING = RolloutResult(samples=[], rewards=[], seconds_generation=0.0, seconds_scoring_tail=0.0, scoring={})


def unscored(samples: list[Sample]) -> RolloutResult:
    """Answers that no reward function and no teacher server is asked about."""
    return RolloutResult(
        samples=samples,
        rewards=[0.0] * len(samples),
        seconds_generation=0.0,
        seconds_scoring_tail=0.0,
        scoring={},
    )


def mix(own: RolloutResult, answers: RolloutResult) -> RolloutResult:
    """Both, the ``answers`` spread evenly, so that every optimizer step of the rollout gets its share of them."""
    total, count = len(own.samples) + len(answers.samples), len(answers.samples)
    taken = {int((i + 0.5) * total / count) for i in range(count)}  # places of the answers: total >= count, so distinct
    own_rows = iter(zip(own.samples, own.rewards, strict=True))
    answer_rows = iter(zip(answers.samples, answers.rewards, strict=True))
    rows = [next(answer_rows if place in taken else own_rows) for place in range(total)]
    return RolloutResult(
        samples=[sample for sample, _ in rows],
        rewards=[reward for _, reward in rows],
        seconds_generation=own.seconds_generation + answers.seconds_generation,
        seconds_scoring_tail=own.seconds_scoring_tail + answers.seconds_scoring_tail,
        scoring={
            name: _together(name)(own.scoring.get(name, 0.0), answers.scoring.get(name, 0.0))
            for name in {**own.scoring, **answers.scoring}
        },
    )


def _together(name: str) -> Callable[[float, float], float]:
    """How two parts' numbers make the rollout's: counters add up, percentiles and peaks do not."""
    return max if name.endswith(("_p50", "_p95", "_p99", "_max")) else add
