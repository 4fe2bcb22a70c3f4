"""Rows of a made-up run that learns."""

from __future__ import annotations

import math
from typing import Any


def learning_run(steps: int, *, evaluated: bool = True, distilled: bool = True) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if evaluated:
        rows.append({"step": 0, "eval_accuracy": 0.34, "time_eval": 1.0})
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "reward_mean": 0.3 + 0.01 * step,
            "policy_loss": 0.01,
            "grad_norm": 0.5,
            "response_length_mean": 33.0,
            "tokens": 1000,
            "unscored_share": 0.0,
            "time_rollout": 0.5,
            "time_teacher": 0.25,
            "time_train": 1.0,
            "time_sync": 0.125,
            "time_step": 2.0,
        }
        if distilled:
            row["opd_reverse_kl"] = 0.21 * math.exp(-step / 20)
        if evaluated and step % 5 == 0:
            row |= {"eval_accuracy": 0.34 + 0.01 * step, "time_eval": 1.0}
        rows.append(row)
    return rows
