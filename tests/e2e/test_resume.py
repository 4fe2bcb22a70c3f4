"""A run killed at any moment and started again ends with the numbers of one that was not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import rows, run, run_cold, start, tiny_flags, without_times

pytestmark = pytest.mark.e2e
STEPS = 7


def flags(folder: Path, **changes: Any) -> list[str]:
    checkpoints = folder / "checkpoints"
    return tiny_flags(folder, num_rollout=STEPS, save=checkpoints, load=checkpoints, save_interval=2, **changes)


def in_background(folder: Path) -> list[str]:
    return flags(folder, async_save=True, save_retain=2, save_hf=folder / "exports" / "step_{rollout_id}")


def kill_when(folder: Path, condition: Callable[[], bool]) -> None:
    process = start(in_background(folder), log=folder.parent / "killed.log")
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(flags(folder), log=folder.with_suffix(".log"))
    return folder


def test_three_kills_change_nothing(tmp_path: Path, whole: Path) -> None:
    killed = tmp_path / "killed"
    reference = without_times(rows(whole))
    assert [row["step"] for row in reference] == list(range(1, STEPS + 1))
    checkpoints = killed / "checkpoints"

    kill_when(killed, lambda: lines(killed) >= 1)  # before the first checkpoint
    assert not (checkpoints / "latest_checkpointed_iteration.txt").exists()
    latest = checkpoints / "latest_checkpointed_iteration.txt"
    kill_when(killed, lambda: lines(killed) >= 3 and latest.exists())  # with work since the checkpoint to repeat
    assert latest.read_text().strip() in ("2", "4")
    kill_when(killed, lambda: lines(killed) >= 4 and any(checkpoints.glob(".tmp_*")))  # while a checkpoint is written
    printed = run_cold(in_background(killed), log=tmp_path / "last.log")

    assert re.search(rf"resumes after step [24] of {STEPS}", printed)
    assert without_times(rows(killed)) == reference
    assert not list(checkpoints.glob(".tmp_*"))
    assert sorted(path.name for path in checkpoints.glob("iter_*")) == ["iter_0000006", "iter_0000007"]
    exports = sorted(path.parent.name for path in killed.glob("exports/*/model.safetensors"))
    assert exports == [f"step_{step}" for step in (2, 4, 6, 7)]


def test_a_finished_run_started_again_does_nothing_more(tmp_path: Path, whole: Path) -> None:
    before = rows(whole)
    run(flags(whole), log=tmp_path / "again.log")
    assert rows(whole) == before
