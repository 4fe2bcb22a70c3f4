"""The closing table: first, best and last values, seconds by phase, and the headline a reader looks for."""

from __future__ import annotations

import io
import re

import pytest

from opd.report.console import make_rich_console
from opd.report.summary import headline, phase_seconds, print_summary
from tests.unit.report.rows import learning_run


def printed(rows: list[dict], files: dict[str, str] | None = None) -> str:
    stream = io.StringIO()
    console, live = make_rich_console(stream)
    assert not live
    print_summary(rows, console, files or {})
    return stream.getvalue()


def cells(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.strip("| ").split("|")][1:]


def test_headline() -> None:
    rows = [
        {"step": 0, "eval_accuracy": 0.34},
        {"step": 1, "opd_reverse_kl": 0.21},
        {"step": 40, "opd_reverse_kl": 0.0425, "eval_accuracy": 0.863},
    ]
    assert headline(rows) == ["accuracy 34.0% -> 86.3% (step 40)", "reverse KL 0.210 -> 0.043 nats/token (x0.20)"]


def test_headline_without_a_meaningful_ratio() -> None:
    rows = [{"step": 1, "opd_reverse_kl": -0.001}, {"step": 2, "opd_reverse_kl": 0.002}]
    assert headline(rows) == ["reverse KL -0.001 -> 0.002 nats/token"]
    assert headline(rows[:1]) == []
    assert headline([]) == []


def test_first_best_and_last() -> None:
    rows = learning_run(10)
    rows[7] |= {"reward_mean": 0.9, "opd_reverse_kl": 0.01}  # step 7
    text = printed(rows)
    assert cells(text, "accuracy") == ["34.0% (step 0)", "44.0% (step 10)", "44.0% (step 10)"]
    assert cells(text, "reverse KL, nats/token") == ["0.1998 (step 1)", "0.0100 (step 7)", "0.1274 (step 10)"]
    assert cells(text, "reward") == ["0.310 (step 1)", "0.900 (step 7)", "0.400 (step 10)"]
    assert cells(text, "response length, tokens") == ["33.0 (step 1)", "-", "33.0 (step 10)"]


def test_time_tokens_and_files() -> None:
    text = printed(learning_run(10), {"metrics": "/out/metrics.jsonl"})
    # ten steps of .5 + .25 + 1 + .125 + .125 other = 2 s, three evaluations of 1 s: 23 s
    assert cells(text, "rollout") == ["5.0", "22%"]
    assert cells(text, "train") == ["10.0", "43%"]
    assert cells(text, "other") == ["1.2", "5%"]
    assert cells(text, "eval") == ["3.0", "13%"]
    assert "10,000 tokens in 20.0 s of training steps, 500 tokens/s" in text
    assert "metrics  /out/metrics.jsonl" in text


def test_unscored_samples_are_counted_aloud() -> None:
    rows = learning_run(5)
    rows[2]["unscored_share"], rows[4]["unscored_share"] = 0.125, 0.25
    assert "samples without a teacher score in 2 steps, at most 25.0% of a rollout (step 4)" in printed(rows)


def test_phases_that_overlap_leave_no_negative_rest() -> None:
    row = {"step": 1, "time_rollout": 2.0, "time_teacher": 1.5, "time_step": 2.5}
    assert phase_seconds(row)["other"] == 0.0


@pytest.mark.parametrize("rows", [[], [{"step": 0, "eval_accuracy": 0.5}], [{"step": 1, "reward_mean": None}]])
def test_runs_that_ended_early_can_be_summed_up(rows: list[dict]) -> None:
    assert "nan" not in printed(rows)


def test_plain_output_has_no_control_characters() -> None:
    text = printed(learning_run(40))
    assert text.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def served_run() -> list[dict]:
    rows = learning_run(4)[1:]
    for row in rows:
        row |= {"samples": 8, "teacher_requests": 9, "teacher_retries": 0, "teacher_hedges": 0, "teacher_failures": 0}
        row |= {"teacher_bytes": 40_000, "teacher_latency_p95": 0.05}
    return rows


def test_the_teachers_server_has_a_part_of_its_own() -> None:
    rows = served_run()
    rows[1] |= {"unscored_share": 0.25, "teacher_retries": 3, "teacher_failures": 2, "teacher_latency_p95": 1.5}
    text = printed(rows)
    assert cells(text, "samples scored") == ["30, and 2 left without a score"]
    assert cells(text, "requests") == ["36: 3 retries, 2 given up"]
    assert cells(text, "answer time, p95") == ["50 ms, at worst 1.5 s (step 2)"]
    assert cells(text, "bytes per scored token") == [f"{160_000 / 3750:.0f}"]
    assert "found in the cache" not in text


def test_bytes_are_those_of_tokens_that_the_server_was_asked_for() -> None:
    rows = served_run()
    for row in rows:
        row |= {"teacher_cache_hits": 6, "teacher_cache_misses": 2}
    text = printed(rows)
    assert cells(text, "found in the cache") == ["75%"]
    assert cells(text, "bytes per scored token") == ["160"]


def test_without_a_server_there_is_no_such_part() -> None:
    assert "samples scored" not in printed(learning_run(4))
