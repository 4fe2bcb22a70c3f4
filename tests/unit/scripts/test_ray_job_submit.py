"""scripts/ray_job_submit.sh: what reaches ``ray job submit``, and what is refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "ray_job_submit.sh"


def submit(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "ray").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "${@:1:5}"\nexec "${@:6}"\n')
    (folder / "ray").chmod(0o755)
    own = {name: value for name, value in os.environ.items() if name != "RAY_JOBS"}
    path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", str(SCRIPT), *words], env=own | path | environment, capture_output=True, text=True)


def test_the_command_runs_in_this_folder_with_its_words_unchanged(tmp_path: Path) -> None:
    done = submit(
        ["bash", "-c", 'pwd; printf "%s|" "$@"', "_", "a b", "$HOME", "c'd"], tmp_path, RAY_JOBS="http://h:8265"
    )
    assert done.stdout.splitlines() == [
        "job",
        "submit",
        "--address",
        "http://h:8265",
        "--",
        str(ROOT),
        "a b|$HOME|c'd|",
    ]


@pytest.mark.parametrize(
    ("words", "environment", "line"),
    [
        ([], {"RAY_JOBS": "http://h:8265"}, "no command"),
        (["python", "train.py"], {}, "RAY_JOBS is not set"),
    ],
)
def test_what_is_missing_is_told(tmp_path: Path, words: list[str], environment: dict[str, str], line: str) -> None:
    done = submit(words, tmp_path, **environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ray_job_submit.sh:") and line in done.stderr
