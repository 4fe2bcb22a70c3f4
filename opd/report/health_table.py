"""Health reports of teachers as one table: a row per check, a column per server, what to do underneath."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from opd.teachers.health_rows import HealthReport, HealthRow, Verdict

STYLES = {Verdict.PASS: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red", Verdict.NOTE: "dim"}


def print_health(reports: Sequence[HealthReport], console: RichConsole) -> None:
    console.print(_table(reports, plain=not console.is_terminal))
    for report in reports:
        for row in report.rows:
            if row.remedy:
                where = f"{report.url}, " if len(reports) > 1 else ""
                line = Text(row.verdict.value, style=STYLES[row.verdict])
                console.print(line.append(f"  {where}{row.check}: {row.remedy}", style="not bold default"))
    console.print(_summary(reports))


def _table(reports: Sequence[HealthReport], *, plain: bool) -> Table:
    table = Table(box=box.ASCII2 if plain else box.ROUNDED, show_lines=len(reports) > 1)
    table.add_column("")
    for report in reports:
        table.add_column(report.url, overflow="fold")
    for check in dict.fromkeys(row.check for report in reports for row in report.rows):
        table.add_row(check, *(_cell(report.row(check)) for report in reports))
    return table


def _cell(row: HealthRow | None) -> Text:
    if row is None:
        return Text("-  not looked at", style="dim")
    return Text(f"{row.verdict.value:<4}", style=STYLES[row.verdict]).append(f"  {row.found}", style="not bold default")


def _summary(reports: Sequence[HealthReport]) -> Text:
    counts = {verdict: sum(row.verdict is verdict for r in reports for row in r.rows) for verdict in Verdict}
    words = [f"{counts[v]} {v.value}" for v in (Verdict.PASS, Verdict.WARN, Verdict.FAIL) if counts[v]]
    worst = next((v for v in (Verdict.FAIL, Verdict.WARN) if counts[v]), Verdict.PASS)
    return Text(", ".join(words), style=STYLES[worst])
