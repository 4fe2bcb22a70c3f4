"""Rules about rollouts that are written ahead of the training, and about answers of older weights in general."""

from __future__ import annotations

import math
from collections.abc import Iterator

from opd.config.flags import flag_text
from opd.config.queries import given
from opd.config.schema import Config


def async_rules(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if not rollout.async_rollout:
        for name, value in given(rollout).items():
            if name == "async_max_staleness":
                yield f"{flag_text(name, value)} needs `--async-rollout`. Add it, or drop the flag."
            elif name.startswith("async_") and not rollout.partial_rollout:
                yield (
                    f"{flag_text(name, value)} needs `--async-rollout` or `--partial-rollout`. Add one, or drop the "
                    "flag."
                )
    if rollout.async_ratio_gate is not None and (rollout.async_rollout or rollout.partial_rollout):
        yield from _gate_rules(config, rollout.async_ratio_gate)
    if config.rollouts_ahead > 0 and config.written_with_teacher:
        yield (
            f"`--async-rollout` with {flag_text('rollout_engine', rollout.rollout_engine)}: there a teacher has a hand "
            "in every token, so a ratio far from 1 is meant, and could not be told from one that comes of old weights. "
            "Drop `--async-rollout`, or choose another engine."
        )
    if config.learns_from_older_weights:
        yield from _older_weights_rules(config)


def _older_weights_rules(config: Config) -> Iterator[str]:
    rollout = config.rollout
    cause = "`--async-rollout`" if config.rollouts_ahead > 0 else "`--partial-rollout`"
    if config.opd.opd_student_logprobs == "behaviour" and config.penalty_coef > 0:
        yield (
            f"`--opd-student-logprobs=behaviour` with {cause}: the penalty would measure the KL of the older "
            "weights that wrote the answer, not of those that learn. Drop one of them."
        )
    if rollout.async_correction == "none" and config.algorithm.use_tis:
        yield (
            "`--async-correction=none` and `--use-tis` contradict each other: the ratio of the one is the ratio of the "
            "other. Drop one of them."
        )


def _gate_rules(config: Config, gate: list[float]) -> Iterator[str]:
    shown = flag_text("async_ratio_gate", gate)
    remedy = "Give two ratios around 1, such as 0.5 2."
    if len(gate) != 2:
        yield f"{shown} has {len(gate)} numbers, and needs LOW and HIGH. {remedy}"
    elif not (0 <= gate[0] < 1 < gate[1] and math.isfinite(gate[1])):
        yield f"{shown} must hold 0 <= LOW < 1 < HIGH: a token on which both agree has the ratio 1. {remedy}"
    if config.written_with_teacher:
        yield (
            f"{shown} with {flag_text('rollout_engine', config.rollout.rollout_engine)}: there a teacher has a hand in "
            "every token, so a ratio far from 1 is meant. Drop one of them."
        )
    if config.policy_weight == 0:
        yield f"{shown} has no effect without a policy loss. Give `--lambda-rl=1` for both losses, or drop it."
