"""What the pages name is there: flags, files, links, metrics, and the messages that troubleshooting.md explains."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from opd.config.flags import build_parser
from opd.config.slime_table import FLAGS
from tests.metric_table import ROOT, table

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("README.md")])
GENERATED = {"flags.md", "from_slime.md"}  # tests of their own
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-])")  # not `--lora-*`, which stands for several
# Flags of other programs that the pages speak of, and two that a tool makes from parts.
OTHERS = {"--chunked-prefill-size", "--mem-fraction-static", "--disable-radix-cache", "--schedule-policy"}
OTHERS |= {"--enable-tokenizer-batch-encode", "--sleep-on-idle", "--address", "--runtime-env-json", "--nproc-per-node"}
OTHERS |= {"--no-deps", "--is-embedding", "--keep-min-tokens", "--keep-max-tokens"}


def prose(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def known_flags() -> set[str]:
    """Those of train.py, of slime, and of every script here."""
    found = {option for action in build_parser()._actions for option in action.option_strings}
    found |= {f"--{name}" for name in FLAGS} | OTHERS
    for folder in ("tools", "benchmarks", "examples", "opd/serving", "scripts"):
        for script in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.sh")]:
            found |= set(FLAG.findall(script.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_flags_exist(page: Path) -> None:
    if page.name in GENERATED:
        return
    named = {flag for flag in FLAG.findall(prose(page)) if not flag.startswith("--no-")}
    assert named <= known_flags() | {"--sglang"}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_and_files_exist(page: Path) -> None:
    text = prose(page)
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
        assert not target or (page.parent / target).exists(), target
    folders = "opd|docs|tests|tools|scripts|examples|benchmarks"
    for named in re.findall(rf"`((?:{folders})/[\w./*-]+)", text):
        assert any(ROOT.glob(named.rstrip("/"))), named


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_into_a_page_find_their_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", prose(page)):
        headings = re.findall(r"^#+ (.+)$", prose(page.parent / target if target else page), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_sites_contents() -> None:
    contents = re.findall(r"^(\w+)$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(contents) == sorted({page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"})


def test_troubleshooting_names_metrics_and_messages_that_exist() -> None:
    rows = [line.split(" | ") for line in prose(ROOT / "docs" / "troubleshooting.md").splitlines() if " | " in line]
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "opd").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # a message that the source breaks into several lines
    metrics = {name for name in re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)`", " ".join(map(" ".join, rows)))}
    assert metrics <= set(table()) | {"vocab_size", "forward_kl"} and len(metrics) > 10
    messages = {text for row in rows for text in re.findall(r"`([a-z]+(?: [a-z-]+)+)`", row[0])}
    assert len(messages) > 5 and {text for text in messages if text not in joined} == set()
