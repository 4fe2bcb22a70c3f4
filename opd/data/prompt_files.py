"""Reads the rows of a prompt file, JSONL or parquet, and refuses a broken one.

A malformed line stops the run at its start, with the numbers of the first few bad lines: a line skipped in silence
would train on other data than the user believes, and a line found broken at step 300 would waste 300 steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd.config.flags import ConfigError

Row = tuple[int, dict[str, Any]]  # (number, fields); numbers count from 1: lines of JSONL, rows of parquet

BAD_ROWS_SHOWN = 3
SHOWN = 60  # characters of a bad line


class PromptDataError(ConfigError):
    """A prompt file that cannot be used. The message names the flag, the file, the rule, the rows and the remedy."""

    @classmethod
    def of_file(
        cls, flag: str, path: Path, rule: str, remedy: str, bad_rows: list[tuple[int, str]] | None = None
    ) -> PromptDataError:
        """``bad_rows``: (row number, what was found) of every row that breaks the rule; the first few are shown."""
        found = ""
        if bad_rows:
            found = " (" + "; ".join(f"row {number}: {what}" for number, what in bad_rows[:BAD_ROWS_SHOWN])
            found += f"; and {len(bad_rows) - BAD_ROWS_SHOWN} more)" if len(bad_rows) > BAD_ROWS_SHOWN else ")"
        return cls(f"`{flag}={path}`: {rule}{found}. {remedy}")


def read_rows(path: Path, *, flag: str) -> list[Row]:
    """Every row of the file; blank lines do not count as rows.

    Raises:
        PromptDataError: no such file, unknown kind, malformed or empty.
    """
    if not path.is_file():
        raise PromptDataError.of_file(flag, path, "no such file", "Check the path.")
    if path.suffix == ".parquet":
        rows = _read_parquet(path, flag)
    elif path.suffix == ".jsonl":
        rows = _read_jsonl(path, flag)
    else:
        rule = "the name must end in .jsonl or .parquet, which says how to read it"
        raise PromptDataError.of_file(flag, path, rule, "Rename or convert the file.")
    if not rows:
        raise PromptDataError.of_file(flag, path, "the file is empty", "It needs one prompt per row.")
    return rows


def _read_jsonl(path: Path, flag: str) -> list[Row]:
    rows, bad = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # byte-order mark
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError:  # also covers bytes that are not UTF-8
            fields = None
        if isinstance(fields, dict):
            rows.append((number, fields))
        else:
            bad.append((number, repr(line[:SHOWN].decode(errors="replace"))))
    if bad:
        rule = f"every line must be one JSON object, and {len(bad)} are not"
        raise PromptDataError.of_file(flag, path, rule, "Fix or delete these lines.", bad)
    return rows


def _read_parquet(path: Path, flag: str) -> list[Row]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.lib.ArrowException, OSError) as error:
        rule = f"pyarrow cannot read it as parquet: {error}"
        raise PromptDataError.of_file(flag, path, rule, "Write the file anew.") from error
    return list(enumerate(table.to_pylist(), start=1))
