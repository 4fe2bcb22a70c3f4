"""The closing table: what changed from the first to the last step, where the time went, where the files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table

from opd.report.console import PHASES, accuracies
from opd.report.cost_summary import cost_table, utilisation_line
from opd.report.serving_summary import serving_table

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trend:
    """First, best and last known value of one metric."""

    label: str
    format: str
    first: tuple[int, float]  # (step, value)
    last: tuple[int, float]
    best: tuple[int, float] | None  # None where neither up nor down is better

    def cells(self) -> list[str]:
        points = (self.first, self.best, self.last)
        return ["-" if point is None else f"{point[1]:{self.format}} (step {point[0]})" for point in points]


def print_summary(rows: Sequence[Row], console: RichConsole, files: Mapping[str, str]) -> None:
    """Prints tables and headline; plain characters where the output is not a terminal. ``files``: label -> path."""
    plain = not console.is_terminal
    for table in (_trend_table(rows), _time_table(rows), cost_table(rows), serving_table(rows)):
        if table.row_count:
            table.box = box.ASCII2 if plain else box.ROUNDED
            console.print(table)
            console.print()
    for line in [*headline(rows), *counts(rows), *utilisation_line(rows)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    width = max((len(label) for label in files), default=0)
    for label, path in files.items():
        console.print(f"{label:<{width}}  {path}", markup=False, highlight=False, soft_wrap=True)


def headline(rows: Sequence[Row]) -> list[str]:
    """``accuracy 34.0% -> 86.3% (step 40)`` and ``reverse KL 0.210 -> 0.043 nats/token (x0.20)``, as far as known."""
    lines = []
    for label in accuracy_labels(rows):
        trend = _trend(label, accuracy_series(rows, label), ".1%", best=max)
        if trend and trend.last[0] > trend.first[0]:
            lines.append(f"{label} {trend.first[1]:.1%} -> {trend.last[1]:.1%} (step {trend.last[0]})")
    kl = _trend("reverse KL", series(rows, "opd_reverse_kl"), ".3f", best=min)
    if kl and kl.last[0] > kl.first[0]:
        first, last = kl.first[1], kl.last[1]
        ratio = f" (x{last / first:.2f})" if first > 0 else ""  # a one-sample estimate can be 0 or below
        lines.append(f"reverse KL {first:.3f} -> {last:.3f} nats/token{ratio}")
    return lines


def series(rows: Sequence[Row], key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that know the value."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def accuracy_labels(rows: Sequence[Row]) -> list[str]:
    """The evaluation sets, in the order of their first appearance."""
    return list(dict.fromkeys(label for row in rows for label, _ in accuracies(row)))


def accuracy_series(rows: Sequence[Row], label: str) -> list[tuple[int, float]]:
    return [(row["step"], value) for row in rows for name, value in accuracies(row) if name == label]


def phase_seconds(row: Row) -> dict[str, float]:
    """Seconds of one step by phase. "other" is what the step took beyond its phases; phases that overlap leave none."""
    seconds = {name: row.get(f"time_{name}") or 0.0 for name in PHASES}
    seconds["other"] = max(0.0, (row.get("time_step") or 0.0) - sum(seconds.values()))
    seconds["eval"] = row.get("time_eval") or 0.0
    return seconds


def _trend(label: str, points: list[tuple[int, float]], format: str, *, best: Any) -> Trend | None:
    if not points:
        return None
    return Trend(
        label=label,
        format=format,
        first=points[0],
        last=points[-1],
        best=best(points, key=lambda point: point[1]) if best else None,
    )


def _trend_table(rows: Sequence[Row]) -> Table:
    table = Table("", "first", "best", "last", title="Training", title_justify="left")
    trends = [_trend(label, accuracy_series(rows, label), ".1%", best=max) for label in accuracy_labels(rows)]
    trends += [
        _trend("reverse KL, nats/token", series(rows, "opd_reverse_kl"), ".4f", best=min),
        _trend("reward", series(rows, "reward_mean"), ".3f", best=max),
        _trend("response length, tokens", series(rows, "response_length_mean"), ".1f", best=None),
    ]
    for trend in trends:
        if trend:
            table.add_row(trend.label, *trend.cells())
    return table


def _time_table(rows: Sequence[Row]) -> Table:
    table = Table("", "seconds", "share", title="Time", title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    per_row = [phase_seconds(row) for row in rows]
    totals = {name: sum(seconds[name] for seconds in per_row) for name in (*PHASES, "other", "eval")}
    whole = sum(totals.values())
    if whole == 0:
        return table
    for name, seconds in totals.items():
        if seconds:
            table.add_row(name, f"{seconds:.1f}", f"{seconds / whole:.0%}")
    return table


def counts(rows: Sequence[Row]) -> list[str]:
    lines = []
    tokens = sum(value for _, value in series(rows, "tokens"))
    seconds = sum(value for _, value in series(rows, "time_step"))
    if tokens:
        rate = f", {tokens / seconds:,.0f} tokens/s" if seconds else ""
        lines.append(f"{tokens:,.0f} tokens in {seconds:,.1f} s of training steps{rate}")
    unscored = [(step, share) for step, share in series(rows, "unscored_share") if share > 0]
    if unscored:
        worst_step, worst = max(unscored, key=lambda point: point[1])
        most = f"at most {worst:.1%} of a rollout (step {worst_step})"
        lines.append(f"samples without a teacher score in {len(unscored)} steps, {most}")
    return lines
