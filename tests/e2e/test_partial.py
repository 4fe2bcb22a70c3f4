"""Whole runs that set answers aside, killed in the middle of a rollout."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.runs import rows, run, start, tiny_flags, without_times

pytestmark = pytest.mark.e2e

STEPS = 3
REWARD = """
from pathlib import Path
from opd.rewards.rules import rule_reward

async def asked(args, sample, **kwargs):
    with Path(r"{calls}").open("a") as stream:
        stream.write(f"{{sample.index}}\\n")
    args.rm_type = "final_answer"
    return await rule_reward(args, sample, **kwargs)
"""


def flags(folder: Path, **changes) -> list[str]:
    """The weights move by less than a float can tell: every run writes the same texts."""
    frozen = {"lr": 1e-30, "num_rollout": STEPS, "num_saved_samples": 16, "rollout_max_running_requests": 4}
    return tiny_flags(folder, **frozen | {"rm_type": None, "custom_rm_path": "asking.asked"} | changes)


def set_aside(folder: Path) -> list[str]:
    checkpoints = {name: folder / "checkpoints" for name in ("save", "load")}
    # Answers have 26 to 38 tokens: half of the prompts in flight are complete after a round.
    pool = {"partial_rollout": True, "over_sampling_batch_size": 8, "partial_rollout_tokens": 35}
    return flags(folder, **pool, **checkpoints, save_interval=2)


def texts(folder: Path) -> dict[int, str]:
    """By number of the sample; no step has one that another step has."""
    found: dict[int, str] = {}
    for step in range(1, STEPS + 1):
        samples = [
            json.loads(line) for line in (folder / "samples" / f"step_{step:05d}.jsonl").read_text().splitlines()
        ]
        assert len(samples) == 16 and not found.keys() & {sample["index"] for sample in samples}
        found |= {sample["index"]: sample["response"] for sample in samples}
    return found


def journal(folder: Path, step: int) -> list[dict]:
    file = folder / "checkpoints" / "rollout_journal" / f"step_{step:07d}.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[1:-1]] if file.exists() else []


def test_set_aside_and_killed_every_answer_is_that_of_a_plain_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    calls = tmp_path / "calls"
    (tmp_path / "asking.py").write_text(REWARD.format(calls=calls))
    plain, whole, broken = (tmp_path / name for name in ("plain", "whole", "broken"))
    run(flags(plain), log=tmp_path / "plain.log")
    run(set_aside(whole), log=tmp_path / "whole.log")

    process = start(set_aside(broken), log=tmp_path / "killed.log")
    try:
        deadline = time.monotonic() + 120
        while not any(entry["kind"] == "reward" for entry in journal(broken, 3)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    kept = {entry["key"] for entry in journal(broken, 3) if entry["kind"] == "reward"}
    assert kept
    calls.unlink()
    run(set_aside(broken), log=tmp_path / "resumed.log")
    asked = [int(index) for index in calls.read_text().split()]
    assert kept.isdisjoint(asked) and len(asked) == len(set(asked))

    table = rows(broken)
    assert without_times(table) == without_times(rows(whole))
    assert all(row["samples"] == 16 for row in table)
    assert [row["partial_rounds"] for row in table] == [1, 1, 1]  # no answer held a rollout up
    assert [row["partial_share"] > 0 for row in table] == [False, True, True]
    assert all(row["partial_unfinished"] > 0 for row in table)
    same, expected = texts(broken), texts(plain)
    assert texts(whole) == same == expected
