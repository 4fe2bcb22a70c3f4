"""The closing table's part about what the run cost: operations by part, and how much of the devices' peak was used."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from opd.config.plan_cost import flop_text

Row = Mapping[str, Any]
FLOPS, UTILISATION = "flops/", "utilisation/"


def cost_table(rows: Sequence[Row]) -> Table:
    """Empty for a run without an account."""
    table = Table("", "operations", "share", title="Compute", title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    totals = operations(rows)
    whole = sum(totals.values())
    for name, total in totals.items():
        table.add_row(name.replace("_", " "), flop_text(total), f"{total / whole:.0%}")
    if totals:
        table.add_row("all", flop_text(whole), "")
    return table


def utilisation_line(rows: Sequence[Row]) -> list[str]:
    used = ", ".join(f"{name} {share:.1%}" for name, share in utilisation(rows).items())
    return [f"of the devices' peak (--plan-device): {used}"] if used else []


def operations(rows: Sequence[Row]) -> dict[str, float]:
    """Part -> operations of all steps, in the order of a step."""
    names = dict.fromkeys(key.removeprefix(FLOPS) for row in rows for key in row if key.startswith(FLOPS))
    return {name: sum(row.get(FLOPS + name) or 0.0 for row in rows) for name in names}


def utilisation(rows: Sequence[Row]) -> dict[str, float]:
    """Phase -> median over steps of the share of the peak, 0 to 1."""
    names = dict.fromkeys(key.removeprefix(UTILISATION) for row in rows for key in row if key.startswith(UTILISATION))
    return {
        name: statistics.median(row[UTILISATION + name] for row in rows if row.get(UTILISATION + name) is not None)
        for name in names
    }
