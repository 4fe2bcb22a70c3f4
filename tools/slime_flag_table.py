"""Prints the table of slime's flags in docs/from_slime.md, made from ``opd.config.slime_table``.

python tools/slime_flag_table.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opd.config.slime_table import FLAGS, VALUES, Kind, Treatment

_KINDS: dict[Kind, str] = {
    "renamed": "read as {words}",
    "passed on": "given to every SGLang engine without its prefix (`--sglang-server-args`)",
    "ignored": "no effect, a warning",
    "refused": "refused",
}


def table() -> str:
    """Markdown: one row per reason, its flags in the order of the source."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, treatment in _entries():
        what = _KINDS[treatment.kind].format(words=f"`{' '.join(treatment.words)}`")
        rows.setdefault((what, treatment.why), []).append(f"`--{name}`")
    lines = ["| slime's flag | here | why, and what instead |", "|---|---|---|"]
    lines += [f"| {' '.join(names)} | {what} | {why} |" for (what, why), names in rows.items()]
    return "\n".join(lines)


def _entries() -> Iterator[tuple[str, Treatment]]:
    order: tuple[Kind, ...] = ("renamed", "passed on", "ignored", "refused")
    everything = {**{f"{flag} {value}": t for (flag, value), t in VALUES.items()}, **FLAGS}
    for kind in order:
        found = [(name, treatment) for name, treatment in everything.items() if treatment.kind == kind]
        yield from sorted(found) if kind == "passed on" else found


if __name__ == "__main__":
    print(table())
