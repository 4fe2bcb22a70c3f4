"""What a rollout of own answers and answers from a file reports of its servers."""

from __future__ import annotations

import pytest

from opd.rollout.driver import RolloutResult
from opd.rollout.mixing import mix

pytestmark = pytest.mark.unit


def part(scoring: dict[str, float]) -> RolloutResult:
    return RolloutResult(samples=[], rewards=[], seconds_generation=2.0, seconds_scoring_tail=0.5, scoring=scoring)


def test_counters_add_up_and_percentiles_and_peaks_do_not() -> None:
    own = {"teacher_requests": 8.0, "teacher_latency_p95": 0.4, "teacher_queue_max": 5.0, "drafts_kept": 0.75}
    answers = {"teacher_requests": 2.0, "teacher_latency_p95": 0.1, "teacher_queue_max": 9.0, "teacher_bytes": 100.0}
    mixed = mix(part(own), part(answers | {"teacher_endpoint_2/latency_p99": 0.3}))
    assert mixed.scoring == {
        "teacher_requests": 10.0,
        "teacher_latency_p95": 0.4,
        "teacher_queue_max": 9.0,
        "drafts_kept": 0.75,  # of one part only: as it is
        "teacher_bytes": 100.0,
        "teacher_endpoint_2/latency_p99": 0.3,
    }
    assert (mixed.seconds_generation, mixed.seconds_scoring_tail) == (4.0, 1.0)
