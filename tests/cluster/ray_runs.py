"""Whole runs over Ray: started as a person would, watched from outside, compared with one process."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.runs import ROOT

STEPS = 4
COMPARED = ("grad_norm", "policy_loss", "distillation_loss", "value_loss", "critic_grad_norm", "opd_reverse_kl")


TOKEN = secrets.token_hex(32)  # else Ray writes one into the home folder


def run_environment() -> dict[str, str]:
    """This process's, without a cluster of somebody else's."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return own | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


class RayRun:
    """``python train.py FLAGS`` in a process group of its own; leaving the block ends what is left of it."""

    def __init__(self, flags: list[str], *, folder: Path, prefix: list[str] | None = None) -> None:
        self.folder = folder
        self.out, self.err = folder.with_suffix(".out"), folder.with_suffix(".err")
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*(prefix or []), sys.executable, "train.py", *flags],
                cwd=ROOT,
                env=run_environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> RayRun:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.living():
            process.kill()
        self.process.kill()
        self.process.wait()

    def rows(self) -> list[dict[str, Any]]:
        """Of the steps that have been reported."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_steps(self, count: int, timeout: float = 240) -> list[dict[str, Any]]:
        """The rows of the first ``count`` steps."""
        deadline = time.monotonic() + timeout
        while len(found := self.rows()) < count:
            assert self.process.poll() is None and time.monotonic() < deadline, self.printed()
            self.living()
            time.sleep(0.05)
        return found[:count]

    def wait(self, timeout: float = 60) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the run did not end\n{self.printed()}")

    def printed(self) -> str:
        return f"{self.out.read_text()[-3000:]}\n{self.err.read_text()[-3000:]}"

    def rank(self, number: int, *, role: str = "actor") -> psutil.Process:
        """The process of a rank of this run."""
        log = os.path.realpath(self.folder / "ranks" / f"{role}_{number}.log")
        for process in psutil.process_iter(["cmdline"]):
            ours = "opd.cluster.rank_main" in (process.info["cmdline"] or [])
            if ours and os.path.realpath(f"/proc/{process.pid}/fd/1") == log:
                return process
        pytest.fail(f"no process writes to {log}\n{self.printed()}")

    def living(self) -> list[psutil.Process]:
        """All processes that this run has started, at any time, and that live."""
        try:
            self._seen.update(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            pass  # it has ended; those that it started were seen before
        return [process for process in self._seen if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def assert_same(rows: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Loss and gradient norm, step by step, within 1e-5."""
    assert len(rows) == len(wanted) == STEPS
    for row, want in zip(rows, wanted, strict=True):
        for name in COMPARED:
            assert (name in row) == (name in want), name
            if name in want:
                assert row[name] == pytest.approx(want[name], rel=1e-5, abs=1e-5), (name, row["step"])
        assert row["grad_norm"] > 1e-3 and row["tokens"] == want["tokens"]
