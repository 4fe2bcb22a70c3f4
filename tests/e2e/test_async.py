"""Rollouts ahead of the training; and a trainer that is killed, or asked to stop, in the middle of a rollout."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.runs import rows, run, start, tiny_flags, without_times

pytestmark = pytest.mark.e2e


def saved_prompts(folder: Path, step: int) -> list[str]:
    (file,) = (folder / "samples").glob(f"*{step}.jsonl")
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


def test_rollouts_ahead_are_one_update_old_and_a_resume_skips_no_prompt(tmp_path):
    ahead, plain = tmp_path / "ahead", tmp_path / "plain"
    saving = {"save": ahead / "checkpoints", "load": ahead / "checkpoints"}
    flags = {"async_rollout": True, "async_ratio_gate": [0.1, 10], **saving}
    run(tiny_flags(ahead, num_rollout=3, **flags), log=tmp_path / "first.log")
    run(tiny_flags(ahead, num_rollout=5, **flags), log=tmp_path / "second.log")
    run(tiny_flags(plain, num_rollout=5), log=tmp_path / "plain.log")

    recorded = rows(ahead)
    assert [row["staleness_max"] for row in recorded] == [0, 1, 1, 0, 1]
    assert all(row["staleness_mean"] == row["staleness_max"] for row in recorded)
    # A sync before the resume's first rollout, so that writer and trainer agree as long as nothing is stale.
    assert all((row["logprob_mismatch_mean"] < 1e-4) == (row["staleness_max"] == 0) for row in recorded)
    assert all(row["time_rollout_wait"] < row["time_rollout"] + row["time_step"] for row in recorded)
    assert recorded[1]["rollout_overlap_share"] > 0
    assert all(0 <= row["gated_share"] < 0.1 for row in recorded)
    for step in range(1, 6):
        assert saved_prompts(ahead, step) == saved_prompts(plain, step)


REWARD = """
from pathlib import Path
from opd.rewards.rules import rule_reward

async def counted(args, sample, **kwargs):
    with Path(r"{calls}").open("a") as stream:
        stream.write(f"{{sample.index}}\\n")
    args.rm_type = "final_answer"
    return await rule_reward(args, sample, **kwargs)
"""


class Interrupted:
    """A run of 3 steps, one answer at a time, that is stopped while it writes a rollout and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journals = folder / "checkpoints" / "rollout_journal"
        (folder.parent / "counting.py").write_text(REWARD.format(calls=folder.parent / "calls"))

    def flags(self) -> list[str]:
        checkpoints = self.folder / "checkpoints"
        return tiny_flags(
            self.folder,
            **{"num_rollout": 3, "rollout_max_running_requests": 1, "rm_type": None},
            custom_rm_path="counting.counted",
            **{"save": checkpoints, "load": checkpoints, "save_interval": 1},
        )

    def stop(self, number: signal.Signals, *, step: int, log: Path) -> int:
        """Sends the signal when the rollout of ``step`` has a few answers; returns the exit status."""
        process = start(self.flags(), log=log)
        try:
            self.wait(lambda: len(self.lines(step)) > 8 or process.poll() is not None)
            process.send_signal(number)
            return process.wait(60)
        finally:
            process.kill()
            process.wait()

    def lines(self, step: int) -> list[str]:
        file = self.journals / f"step_{step:07d}.jsonl"
        return file.read_text().split("\n")[1:-1] if file.exists() else []

    def rewarded(self, step: int) -> set[int]:
        entries = [json.loads(line) for line in self.lines(step)]
        return {entry["key"] for entry in entries if entry["kind"] == "reward"}

    @staticmethod
    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)


def test_kill_and_sigterm_in_mid_rollout_lose_nothing_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    calls = tmp_path / "calls"
    whole, broken = Interrupted(tmp_path / "whole"), Interrupted(tmp_path / "broken")
    run(whole.flags(), log=tmp_path / "whole.log")
    assert not list(whole.journals.iterdir())  # the last checkpoint replaces the journal

    calls.unlink()
    assert broken.stop(signal.SIGKILL, step=2, log=tmp_path / "killed.log") == -signal.SIGKILL
    kept = broken.rewarded(2)
    assert len(kept) >= 3
    calls.unlink()
    assert broken.stop(signal.SIGTERM, step=3, log=tmp_path / "terminated.log") == 0
    asked = {int(index) for index in calls.read_text().split()}
    assert kept.isdisjoint(asked) and kept | asked >= set(range(16, 32))
    printed = (tmp_path / "terminated.log").read_text()
    assert "answers and" in printed and "step 2 is saved" in printed and "Traceback" not in printed

    kept = broken.rewarded(3)
    calls.unlink()
    run(broken.flags(), log=tmp_path / "last.log")
    asked = [int(index) for index in calls.read_text().split()]
    assert len(asked) == len(set(asked)) and kept.isdisjoint(asked)
    assert without_times(rows(broken.folder)) == without_times(rows(whole.folder))
