"""The commands that README.md and docs/quick_start.md tell a reader to type, and a checkout to type them in."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/quick_start.md")
NOT_CHECKED_OUT = {".git", ".venv", "build", "outputs"}


def commands() -> list[str]:
    """Those in ``bash`` blocks, in the pages' order, each as one line without comments. A line ``NAME=VALUE`` is put
    into the lines that say ``$NAME``.

    Raises:
        ValueError: a block is neither ``bash`` nor ``text`` (what is printed), so it could go unnoticed.
    """
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if language not in ("bash", "text"):
                raise ValueError(f"{page}: a block begins with ```{language}; write ```bash or ```text")
            if language == "bash":
                for name, value in re.findall(r"^(\w+)=(\S+)\n", block, re.MULTILINE):
                    block = block.replace(f"{name}={value}\n", "").replace(f"${name}", value)
                lines = re.sub(r"\\\n *", "", block).splitlines()
                found += [re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines]
    return list(dict.fromkeys(filter(None, found)))


def command(beginning: str) -> str:
    """The one command that begins so.

    Raises:
        ValueError: no page has it, or several commands begin so.
    """
    fitting = [each for each in commands() if each == beginning] or [
        each for each in commands() if each.startswith(beginning)
    ]
    if len(fitting) != 1:
        raise ValueError(f"{len(fitting)} commands of {PAGES} begin with {beginning!r}")
    return fitting[0]


def checkout(folder: Path) -> Path:
    """``folder`` as a clone after ``make setup``: links to this repository, and to this environment as ``.venv``."""
    environment = folder / ".venv"
    if environment.exists():
        return folder
    for entry in ROOT.iterdir():
        if entry.name not in NOT_CHECKED_OUT:
            (folder / entry.name).symlink_to(entry)
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".opd-installed":
            (environment / entry.name).symlink_to(entry)
    (environment / ".opd-installed").touch()  # the Makefile's sign that the set-up is done
    return folder


def execute(beginning: str, folder: Path, *, more: str = "", without: str = "", timeout: float = 280) -> str:
    """Runs the documented command that begins so in a checkout in ``folder``, in a reader's environment, without what
    pytest or its settings add. Returns what it prints.

    Bash gets it as it stands. ``.venv/bin/python SCRIPT ...`` starts as a copy of a warm process (tests/warm.py), which
    saves its imports.

    Args:
        more: words behind it, to shorten it.
        without: words to leave out of it.

    Raises:
        AssertionError: it fails.
    """
    typed = f"{command(beginning).replace(without, '')} {more}"
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "TMPDIR": tempfile.gettempdir()}
    interpreter, _, words = typed.partition(" ")
    with tempfile.TemporaryFile("w+") as output:
        streams = {"cwd": checkout(folder), "stdout": output, "stderr": output}
        if interpreter == ".venv/bin/python":
            process = warm.start(shlex.split(words), environment=environment, **streams)
        else:
            process = subprocess.Popen(["bash", "-c", typed], env=environment, stdin=subprocess.DEVNULL, **streams)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        printed = output.read()
    assert code == 0, f"{typed}\n{printed[-4000:]}"
    return printed
