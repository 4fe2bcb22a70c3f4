"""Paths that this user may not read or write are refused before a run starts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opd.config.access_rules import access_rules
from opd.config.flags import parse_flags

NOBODY = 65534


@contextmanager
def ordinary_user() -> Iterator[None]:
    """``os.access`` asks for the real user, who is another one here where the tests run as root, who may do all."""
    if os.geteuid() != 0:
        yield
        return
    os.setreuid(NOBODY, 0)
    try:
        yield
    finally:
        os.setreuid(0, 0)


@pytest.fixture
def shared(workplace: Path) -> Iterator[Path]:
    """A folder that everybody may pass through, unlike pytest's, with the files of ``workplace``."""
    folder = Path(tempfile.mkdtemp(prefix="opd-access-"))
    shutil.copytree(workplace, folder, dirs_exist_ok=True)
    folder.chmod(0o755)
    os.chdir(folder)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    os.chdir(workplace)
    shutil.rmtree(folder)


def broken(argv: list[str]) -> list[str]:
    with ordinary_user():
        return list(access_rules(parse_flags(argv)))


def test_what_may_not_be_read(shared: Path, command: Callable[..., list[str]]) -> None:
    (shared / "out").mkdir(mode=0o777)
    (shared / "out").chmod(0o777)
    argv = command("megatron")
    assert broken(argv) == []
    (shared / "prompts.jsonl").chmod(0o200)
    (shared / "teacher").chmod(0o600)
    denied = "may not be read by this user (permission denied). Change its permissions, or give another path."
    assert broken(argv) == [f"`--prompt-data=prompts.jsonl` {denied}", f"`--opd-teacher-load=teacher` {denied}"]


def test_what_may_not_be_written(shared: Path, command: Callable[..., list[str]]) -> None:
    (shared / "kept").mkdir()
    (shared / "kept").chmod(0o555)
    (shared / "open").mkdir()
    (shared / "open").chmod(0o777)
    paths = "--output-dir open/out --save kept/checkpoints --opd-teacher-cache prompts.jsonl/cache"
    argv = command("sglang", paths, drop=("--output-dir",))
    assert broken(argv) == [
        f"`--save=kept/checkpoints` cannot be written: in {shared}/kept this user may not write (permission denied, or "
        "a read-only file system). Change its permissions, or give another path.",
        f"`--opd-teacher-cache=prompts.jsonl/cache` lies below {shared}/prompts.jsonl, which is a file. Give another "
        "path.",
    ]
    assert broken([*argv, "--dry-run"]) == []
