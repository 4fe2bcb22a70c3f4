"""A bar over the samples of one call, on the terminal's error stream."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from opd.report.console import make_rich_console
from opd.sampling.output import MixtureSample


def with_progress(samples: Iterable[MixtureSample], total: int, *, shown: bool | None) -> Iterator[MixtureSample]:
    """Passes the samples through.

    Args:
        shown: None: only on a terminal. True off a terminal writes the finished bar as one line.
    """
    console, live = make_rich_console(sys.stderr)
    if not (live if shown is None else shown):
        yield from samples
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("samples"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    start, tokens = time.monotonic(), 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, tokens=0, rate=0.0)
        for sample in samples:
            tokens += len(sample.response_ids)
            rate = tokens / max(time.monotonic() - start, 1e-9)
            progress.update(task, advance=1, tokens=tokens, rate=rate)
            yield sample
