"""Every illegal command line in refusals.txt ends with exactly its line on stderr and exit status 2."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd.config import ConfigError, exit_with_error, parse_config

ROOT = Path(__file__).parents[3]
SECONDS = 5.0  # the promise for a configuration error


@dataclass(frozen=True)
class Refusal:
    name: str
    base: str
    add: str
    drop: tuple[str, ...]
    line: str


def read_refusals() -> list[Refusal]:
    text = (Path(__file__).parent / "refusals.txt").read_text(encoding="utf-8")
    refusals = []
    for block in text.strip().split("\n\n")[1:]:
        name, command, line = block.split("\n")
        base, *parts = command.split("; ")
        drop = tuple(part.removeprefix("drop ") for part in parts if part.startswith("drop "))
        add = " ".join(part.removeprefix("add ") for part in parts if part.startswith("add "))
        refusals.append(Refusal(name.strip("[]"), base, add, drop, line))
    return refusals


REFUSALS = read_refusals()


def test_the_table_covers_the_rules() -> None:
    assert len(REFUSALS) >= 90
    assert len({refusal.name for refusal in REFUSALS}) == len(REFUSALS)


@pytest.mark.parametrize("base", ["grpo", "megatron", "sglang"])
def test_the_unbroken_command_lines_are_accepted(workplace: Path, command: Callable[..., list[str]], base: str) -> None:
    assert parse_config(command(base)).samples_per_rollout == 32


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_refusal(
    workplace: Path, command: Callable[..., list[str]], refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(refusal.base, refusal.add, refusal.drop)
    with pytest.raises(ConfigError) as raised:
        parse_config(argv)
    with pytest.raises(SystemExit) as left:
        exit_with_error(raised.value)
    assert left.value.code == 2
    assert capsys.readouterr().err == refusal.line + "\n"


@pytest.mark.parametrize("name", ["sglang with teacher folder", "group of one", "teacher vocabulary", "unknown flag"])
def test_train_py_refuses_at_once(workplace: Path, command: Callable[..., list[str]], name: str) -> None:
    refusal = next(r for r in REFUSALS if r.name == name)
    argv = [sys.executable, str(ROOT / "train.py"), *command(refusal.base, refusal.add, refusal.drop)]
    start = time.monotonic()
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=workplace)
    assert time.monotonic() - start < SECONDS
    assert ended.returncode == 2
    assert ended.stderr == refusal.line + "\n"
    assert ended.stdout == ""


def test_checking_imports_no_engine(workplace: Path, command: Callable[..., list[str]]) -> None:
    code = (
        "import sys; from opd.config import parse_config; parse_config(sys.argv[1:]);"
        "print([m for m in ('torch', 'transformers', 'megatron', 'sglang', 'ray', 'aiohttp') if m in sys.modules])"
    )
    argv = [sys.executable, "-c", code, *command("sglang", "--custom-rm-path my_rewards.length")]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{workplace}"}
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environ)
    assert ended.stderr == ""
    assert ended.stdout == "[]\n"
