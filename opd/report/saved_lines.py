"""Which of a run's saved answers its page is made from, chosen by where they lie and how long they are, unparsed.

A long run saves gigabytes of them, which as objects take ten times the memory; the page has room for some megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd.saved_answers import spread

INDEX = re.compile(rb'"index": *(\d+)')
HEAD = 200  # bytes of a line in which its index is


@dataclass(frozen=True, kw_only=True)
class SavedLine:
    """One saved answer: a line of ``path``, the ``number``-th from 1.

    start, size: bytes.
    index: the answer's own number, by which evaluations agree on the prompt; None where the line does not show it.
    """

    path: Path
    number: int
    start: int
    size: int
    index: int | None

    @property
    def evaluation(self) -> bool:
        return _place(self.path)[1]


def saved_lines(folder: Path) -> list[SavedLine]:
    """All that are in ``folder``, by step; rollouts before evaluations. Holds one line at a time.

    Raises:
        OSError: a file that cannot be read, or is gone by then.
    """
    lines = []
    for path in sorted(folder.glob("*.jsonl"), key=_place):
        start = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                found = INDEX.search(line, 0, HEAD)
                index = int(found[1]) if found else None
                lines.append(SavedLine(path=path, number=number, start=start, size=len(line), index=index))
                start += len(line)
    return lines


def choose_lines(lines: Sequence[SavedLine], max_bytes: int) -> list[SavedLine]:
    """Those to show, in their order, at most ``max_bytes`` in all.

    First come the answers that the first and the last evaluation have to the same prompts, both or neither: they show
    what the training changed. The room that is left goes to the others, evenly over the run.
    """
    pairs = _evaluation_pairs(lines)
    chosen = _that_fit(pairs, max_bytes)
    paired = {line for pair in pairs for line in pair}
    others = [(line,) for line in lines if line not in paired]
    chosen += _that_fit(others, max_bytes - _size(chosen))
    kept = {line for group in chosen for line in group}
    return [line for line in lines if line in kept]


def total_bytes(lines: Iterable[SavedLine]) -> int:
    return sum(line.size for line in lines)


def _evaluation_pairs(lines: Sequence[SavedLine]) -> list[tuple[SavedLine, ...]]:
    """[(of the first evaluation, of the last)], by index; singles where there is one evaluation only."""
    files = list(dict.fromkeys(line.path for line in lines if line.evaluation))
    if not files:
        return []
    first, last = ({line.index: line for line in lines if line.path == path} for path in (files[0], files[-1]))
    return [tuple(dict.fromkeys((first[index], last[index]))) for index in first if index in last]


def _that_fit(groups: Sequence[tuple[SavedLine, ...]], max_bytes: int) -> list[tuple[SavedLine, ...]]:
    """As many as fit, at even distances."""
    fitting, limit = 0, len(groups)
    while fitting < limit:
        count = (fitting + limit + 1) // 2
        if _size(spread(groups, count)) <= max_bytes:
            fitting = count
        else:
            limit = count - 1
    return spread(groups, fitting)


def _size(groups: Iterable[Iterable[SavedLine]]) -> int:
    return sum(map(total_bytes, groups))


def _place(path: Path) -> tuple[str, bool]:
    """Of a file, for sorting: step, whether it is an evaluation's."""
    return path.stem.rpartition("_")[2].zfill(12), path.stem.startswith("eval")
