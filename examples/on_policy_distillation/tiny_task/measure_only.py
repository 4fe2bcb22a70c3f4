"""For ``--custom-reward-post-process-path``: the task reward is measured and logged, and trains nothing."""

from __future__ import annotations

import argparse
from typing import Any

from opd.types import Sample


def measure_only(args: argparse.Namespace, samples: list[Sample], **_: Any) -> tuple[list[float], list[float]]:
    """(rewards to report, rewards that make advantages: all 0, so that only the teacher speaks)."""
    rewards = [float(sample.reward) for sample in samples]
    return rewards, [0.0] * len(rewards)
