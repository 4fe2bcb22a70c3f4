"""How far a tool is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole

HEARTBEAT = 30.0  # seconds between lines where there is no terminal

Count = Callable[[int, int, str], None]  # finished, wanted, what else there is to say


@contextmanager
def counting(console: RichConsole, live: bool, what: str, *, total: int | None, first: str) -> Iterator[Count]:
    """Gives what to call after each of the things that are counted.

    Args:
        what: they are, in the plural.
        total: wanted, where that is known before the first call.
        first: said until then.
    """
    if not live:
        last_line = time.monotonic()

        def write_line(finished: int, wanted: int, detail: str) -> None:
            nonlocal last_line
            if time.monotonic() - last_line > HEARTBEAT:
                last_line = time.monotonic()
                console.print(f"{finished}/{wanted} {what}, {detail}", highlight=False)

        yield write_line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, detail=first)
        yield lambda finished, wanted, detail: bar.update(task, total=wanted, completed=finished, detail=detail)
