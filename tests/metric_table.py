"""docs/metrics.md as the tests read it: which keys of metrics.jsonl it knows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "metrics.md"
PLACES = {"NAME": r"[^/]+", "N": r"\d+"}  # words in a name that stand for others


@lru_cache
def table() -> dict[str, str]:
    """Name -> file that writes it."""
    rows = re.findall(r"^\| `([^`]+)` \|.*\| `([^`]+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a name stands there twice"
    return dict(rows)


def literals(name: str) -> list[str]:
    """A name of the page without its placeholders."""
    return [word for word in _words(name) if word not in PLACES]


@lru_cache
def _known() -> re.Pattern[str]:
    patterns = ("".join(PLACES.get(word) or re.escape(word) for word in _words(name)) for name in table())
    return re.compile("|".join(patterns))


def _words(name: str) -> list[str]:
    return re.split(r"(?<![A-Z])([A-Z]+)(?![A-Z])", name)


def undocumented(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Keys that the page does not know."""
    return {key for row in rows for key in row if not _known().fullmatch(key)}
