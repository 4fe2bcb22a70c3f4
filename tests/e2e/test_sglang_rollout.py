"""One run with everything that can move between trainer and engine: rollouts ahead, a router, weights by broadcast. Its
SGLang engine is killed while it writes, then the trainer; nothing that was finished is lost or written again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from opd.rollout.journal_values import decoded
from tests import warm
from tests.e2e.runs import rows, run, start, tiny_flags

pytestmark = pytest.mark.e2e

SAMPLES = 16  # per rollout
STEPS = 4
PATIENCE_SECONDS = 300.0
ENGINE_DIES, TRAINER_DIES = 2, 3  # while the rollout of this step is written


class Run:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        checkpoints = folder / "checkpoints"
        self.flags = tiny_flags(
            folder,
            num_rollout=STEPS,
            num_saved_samples=SAMPLES,
            rollout_engine="sglang",
            rollout_max_running_requests=2,  # a rollout takes long enough to be interrupted
            rollout_temperature=1.5,  # sampling on the servers cannot be seeded: no answer is written twice
            sglang_max_restarts=1,
            sglang_weight_sync="distributed",
            use_sglang_router=True,
            async_rollout=True,
            save=checkpoints,
            load=checkpoints,
            save_interval=1,
        )

    def journal(self, step: int, kind: str) -> dict[int, dict[str, Any]]:
        """What of the rollout is on disk, by sample."""
        file = self.folder / "checkpoints" / "rollout_journal" / f"step_{step:07d}.jsonl"
        lines = file.read_text().split("\n")[1:-1] if file.exists() else []
        entries = [json.loads(line) for line in lines]
        return {entry["key"]: decoded(entry["result"]) for entry in entries if entry["kind"] == kind}

    def half_written(self, step: int) -> bool:
        return 3 <= len(self.journal(step, "answer")) < SAMPLES - 3

    def samples(self, step: int) -> list[dict[str, Any]]:
        file = self.folder / "samples" / f"step_{step:05d}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]


def wait_until(condition: Callable[[], bool], process: warm.WarmProcess, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)


def engine_of(trainer: int) -> psutil.Process:
    servers = [p for p in psutil.Process(trainer).children() if "opd.serving.sglang_cpu" in p.cmdline()]
    (server,) = servers
    return server


def test_an_engine_and_then_the_trainer_killed_while_they_write_ahead(tmp_path: Path) -> None:
    tried, log = Run(tmp_path / "run"), tmp_path / "killed.log"
    process = start(tried.flags, log=log)
    try:
        wait_until(lambda: tried.half_written(ENGINE_DIES), process, log)
        engine_of(process.pid).kill()
        wait_until(lambda: tried.half_written(TRAINER_DIES), process, log)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    kept = tried.journal(TRAINER_DIES, "answer")
    assert "restart 1 of 1" in log.read_text() and "is back after" in log.read_text()
    assert not psutil.wait_procs(family, timeout=10)[1]  # engine and router end with their trainer

    printed = run(tried.flags, log=tmp_path / "resumed.log", timeout=PATIENCE_SECONDS)
    resumed_after = int(re.search(r"resumes after step (\d) of 4", printed)[1])
    assert resumed_after in (TRAINER_DIES - 2, TRAINER_DIES - 1)  # that step's training may have gone on meanwhile
    table = rows(tried.folder)
    assert [row["step"] for row in table] == [1, 2, 3, 4]
    assert [(row["samples"], row["aborted_share"]) for row in table] == [(SAMPLES, 0.0)] * STEPS
    assert table[0]["staleness_max"] == 0
    assert [row["staleness_max"] for row in table if row["step"] in (2, 4)] == [1, 1]
    assert all(row["staleness_max"] <= 1 for row in table)
    for step in range(1, STEPS + 1):
        assert [sample["index"] for sample in tried.samples(step)] == list(
            range(SAMPLES * step - SAMPLES, SAMPLES * step)
        )
    written = {sample["index"]: sample["token_ids"] for sample in tried.samples(TRAINER_DIES)}
    assert len(kept) >= 3 and {key: written[key] for key in kept} == {key: r["response_ids"] for key, r in kept.items()}
