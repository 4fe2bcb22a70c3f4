"""Starting ``train.py`` as a person would, on the shipped tiny task, and reading what it leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import warm
from tests.metric_table import undocumented

ROOT = Path(__file__).resolve().parents[2]
TASK = ROOT / "examples" / "on_policy_distillation" / "tiny_task"


def tiny_flags(output: Path, **changes: Any) -> list[str]:
    """A small run: 4 prompts x 4 answers, the co-loaded teacher. ``changes`` by flag name; None drops a flag."""
    flags: dict[str, Any] = {
        "hf_checkpoint": TASK / "student",
        "use_opd": True,
        "opd_type": "megatron",
        "opd_teacher_load": TASK / "teacher",
        "prompt_data": TASK / "train.jsonl",
        "input_key": "prompt",
        "label_key": "label",
        "rollout_shuffle": True,
        "rm_type": "final_answer",
        "num_rollout": 6,
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 4,
        "rollout_max_response_len": 56,
        "lr": 2e-4,
        "output_dir": output,
        "use_tensorboard": False,
    } | changes
    words: list[str] = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if value is False:
            words.append(flag.replace("--", "--no-", 1))
        elif value is True:
            words.append(flag)
        elif value is not None:
            words += [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def sglang_flags(output: Path, port: int, **changes: Any) -> list[str]:
    """``tiny_flags`` with the teacher on the server at ``port``."""
    teacher = {
        "opd_type": "sglang",
        "opd_teacher_load": None,
        "rm_url": f"http://127.0.0.1:{port}/generate",
        "opd_teacher_timeout": 20,
        "opd_teacher_retries": 1,
    }
    return tiny_flags(output, **teacher | changes)


def start(flags: list[str], *, log: Path, file_limit: int | None = None) -> warm.Process:
    """``file_limit``: bytes that one file may have, as a disk that fills up during a large write."""
    with log.open("ab") as stream:
        return warm.start(["train.py", *flags], stdout=stream, stderr=stream, file_limit=file_limit)


def run(flags: list[str], *, log: Path, expect: int = 0, timeout: float = 180, **options: Any) -> str:
    """Runs to the end and returns what was printed."""
    process = start(flags, log=log, **options)
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
        process.wait()
    printed = log.read_text()
    assert code == expect, f"exit status {code}, expected {expect}\n{printed[-4000:]}"
    return printed


def run_cold(flags: list[str], *, log: Path, timeout: float = 180) -> str:
    """``run`` in an interpreter of its own: another order of imports and another seed of string hashes."""
    with log.open("ab") as stream:
        command = [sys.executable, "train.py", *flags]
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=timeout
        )
    printed = log.read_text()
    assert done.returncode == 0, printed[-4000:]
    return printed


def run_and_repeat(flags: list[str], folder: Path, *, step: int) -> list[dict[str, Any]]:
    """Rows of a run that saves to ``folder``/checkpoints at ``step`` and at its end, after checking that what followed
    ``step``, run again as after a kill, gives the same."""
    run(flags, log=folder.with_suffix(".first.log"))
    table = rows(folder)
    latest = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    last = table[-1]["step"]
    assert latest.read_text().strip() == str(last)
    latest.write_text(str(step))
    assert f"resumes after step {step} of {last}" in run(flags, log=folder.with_suffix(".second.log"))
    assert without_times(rows(folder)) == without_times(table)
    return table


def error_line(printed: str) -> str:
    """The one line that says why a run ended."""
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in printed, printed[-3000:]
    return lines[0]


def wait_for_steps(process: warm.Process, output: Path, steps: int, *, log: Path) -> None:
    """Until the run has done that many.

    Raises:
        AssertionError: it ended before, or takes over two minutes.
    """
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or len(rows(output)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


def rows(output: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert undocumented(found) == set(), "docs/metrics.md does not know these"
    return found


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what the clock says."""
    clocked = re.compile(r"time_.*|utilisation/.*|.*idle_share|.*busy_seconds")
    return [{k: v for k, v in row.items() if not clocked.fullmatch(k)} for row in rows]
