"""The closing table's part about a teacher that was asked for scores, a server or a function: what it scored, and how
much trouble that was."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]


def serving_table(rows: Sequence[Row]) -> Table:
    """Empty for a run whose teacher, if any, was co-loaded."""
    asked = [row for row in rows if row.get("teacher_requests") is not None]
    kind = "server" if any(_over_http(row) for row in asked) else "function"
    table = Table("", "", title=f"Teacher {kind}", title_justify="left", show_header=False)
    for label, text in _lines(asked) if asked else ():
        table.add_row(label, text)
    return table


def _lines(rows: Sequence[Row]) -> list[tuple[str, str]]:
    scored = sum(_scored(row, "samples") for row in rows)
    unscored = sum(_number(row, "samples") for row in rows) - scored
    lines = [("samples scored", f"{scored:,.0f}, and {unscored:,.0f} left without a score")]
    hits, misses = _total(rows, "teacher_cache_hits"), _total(rows, "teacher_cache_misses")
    if hits + misses:
        lines.append(("found in the cache", f"{hits / (hits + misses):.0%}"))
    lines.append(("requests", _requests(rows)))
    points = [(row["teacher_latency_p95"], row["step"]) for row in rows if row.get("teacher_latency_p95") is not None]
    if points:
        worst, step = max(points)
        median = statistics.median(seconds for seconds, _ in points)
        lines.append(("answer time, p95", f"{_seconds(median)}, at worst {_seconds(worst)} (step {step})"))
    tokens = sum(_scored(row, "tokens") * _asked_share(row) for row in rows)
    if tokens and any(_over_http(row) for row in rows):
        lines.append(("bytes per scored token", f"{_total(rows, 'teacher_bytes') / tokens:.0f}"))
    return lines


def _requests(rows: Sequence[Row]) -> str:
    """``5,130: 3 retries, 7 hedges, 2 given up``: zeros are left out."""
    names = {"retries": "retries", "hedges": "hedges", "failures": "given up", "breaker_openings": "breaker openings"}
    counts = {label: _total(rows, f"teacher_{name}") for name, label in names.items()}
    trouble = ", ".join(f"{count:,.0f} {label}" for label, count in counts.items() if count)
    return f"{_total(rows, 'teacher_requests'):,.0f}: {trouble or 'no retries, none given up'}"


def _over_http(row: Row) -> bool:
    return row.get("teacher_bytes") is not None


def _scored(row: Row, name: str) -> float:
    return _number(row, name) * (1 - _number(row, "unscored_share"))


def _asked_share(row: Row) -> float:
    """Of the samples, those whose scores were not in the cache."""
    hits, misses = _number(row, "teacher_cache_hits"), _number(row, "teacher_cache_misses")
    return misses / (hits + misses) if hits + misses else 1.0


def _total(rows: Sequence[Row], name: str) -> float:
    return sum(_number(row, name) for row in rows)


def _number(row: Row, name: str) -> float:
    return row.get(name) or 0.0


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
