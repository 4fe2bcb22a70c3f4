"""The teacher check as a person runs it: exit status, table, JSON, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_teacher.py"), *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )


def test_servers_that_are_not_there_are_columns_and_no_traceback(tmp_path: Path) -> None:
    ended = run("http://127.0.0.1:9/generate,http://127.0.0.1:7/generate*2", "--json", str(tmp_path / "health.json"))
    assert ended.returncode == 1
    assert ended.stderr == ""
    header, row = (line for line in ended.stdout.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header.strip("| ").split("|")] == ["http://127.0.0.1:9", "http://127.0.0.1:7"]
    assert row.count("FAIL") == 2
    assert ended.stdout.rstrip().endswith("2 FAIL")
    written = json.loads((tmp_path / "health.json").read_text())
    assert [teacher["rows"][0]["verdict"] for teacher in written["teachers"]] == ["FAIL", "FAIL"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["127.0.0.1:13141"], "`127.0.0.1:13141` is no address"),
        (["http://a/generate*0"], "the weight `*0` is no number above 0"),
        (["http://a", "--samples", "0"], "`--samples=0` must be at least 1"),
        (["http://a", "--hf-checkpoint", "nowhere"], "`--hf-checkpoint=nowhere` does not exist"),
        (["http://a", "--api-key-env", "OPD_NO_SUCH_KEY"], "that environment variable is not set"),
        (["http://a", "--opd-teacher-tokenizer", "."], "`--opd-teacher-tokenizer` needs `--hf-checkpoint`"),
        (["http://a", "--answers", "."], "`--answers` needs `--opd-teacher-tokenizer`"),
        ([], "arguments are required: URL"),
    ],
)
def test_wrong_flags_end_with_one_line_and_status_2(words: list[str], message: str) -> None:
    ended = run(*words)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert message in ended.stderr
