"""A run killed at any moment and started again ends with the numbers of one that was not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.runs import rows, run, start, tiny_flags, without_times

pytestmark = pytest.mark.e2e
STEPS = 7


def flags(folder: Path, **changes) -> list[str]:
    checkpoints = folder / "checkpoints"
    return tiny_flags(
        folder, **{"num_rollout": STEPS, "save": checkpoints, "load": checkpoints, "save_interval": 2} | changes
    )


def kill_when(folder: Path, condition: Callable[[], bool]) -> None:
    process = start(flags(folder), log=folder.parent / "killed.log")
    try:
        deadline = time.monotonic() + 120
        while not condition():
            assert process.poll() is None, "the run ended before the moment to kill it"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_three_kills_change_nothing(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(flags(whole), log=tmp_path / "whole.log")
    reference = without_times(rows(whole))
    assert [row["step"] for row in reference] == list(range(1, STEPS + 1))
    checkpoints = killed / "checkpoints"

    kill_when(killed, lambda: lines(killed) >= 1)  # before the first checkpoint
    assert not (checkpoints / "latest_checkpointed_iteration.txt").exists()
    kill_when(killed, lambda: lines(killed) >= 3)  # in a later step, with work since the checkpoint to repeat
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    kill_when(killed, lambda: lines(killed) >= 4 and any(checkpoints.glob(".tmp_*")))  # while a checkpoint is written
    printed = run(flags(killed), log=tmp_path / "last.log")

    assert re.search(rf"resumes after step [24] of {STEPS}", printed)
    assert without_times(rows(killed)) == reference
    assert not list(checkpoints.glob(".tmp_*"))


def test_a_finished_run_started_again_does_nothing_more(tmp_path):
    run(flags(tmp_path / "run", num_rollout=2), log=tmp_path / "first.log")
    before = rows(tmp_path / "run")
    run(flags(tmp_path / "run", num_rollout=2), log=tmp_path / "again.log")
    assert rows(tmp_path / "run") == before
