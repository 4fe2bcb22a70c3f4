"""Starting ``train.py`` as a person would, on the shipped tiny task, and reading what it leaves."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def start(flags: list[str], *, log: Path, file_limit: int | None = None) -> subprocess.Popen[bytes]:
    """``file_limit``: bytes that one file may have, as a disk that fills up during a large write."""

    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "train.py", *flags],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=limit,
        )


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


def rows(output: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert undocumented(found) == set(), "docs/metrics.md does not know these"
    return found


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what the clock says."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time_") and not k.endswith("_idle_share")} for row in rows
    ]
