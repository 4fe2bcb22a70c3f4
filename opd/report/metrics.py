"""OUTPUT_DIR/metrics.jsonl: one JSON object per step, the record every other view of a run is made from.

Keys (a row carries those it has): ``step`` (int, required), ``reward_mean``, ``opd_reverse_kl`` (nats per token),
``policy_loss``, ``grad_norm``, ``lr``, ``response_length_mean`` and ``tokens`` (tokens), ``truncated_share`` and
``unscored_share`` (0 to 1), ``logprob_mismatch_mean`` and ``logprob_mismatch_max`` (nats),
``time_rollout``, ``time_teacher``, ``time_train``, ``time_sync``, ``time_step`` (seconds; the step without its
evaluation), ``time_eval`` (seconds). On evaluation steps ``eval_accuracy`` (0 to 1), and ``eval/<name>_accuracy`` for
each set when there are several; ``eval_accuracy`` is then the first.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from opd.errors import UserError

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"


class MetricsError(UserError):
    """The metrics file cannot be written or read. The message names the file and what to do."""


class MetricsWriter:
    """Appends rows; after a kill at any moment the file holds whole lines only, once it is opened again.

    Write a step's row before its checkpoint: then a resume from that checkpoint finds every row up to it.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir) / FILE_NAME
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)  # unbuffered: no row waits in this process
            self._drop_torn_line()
        except OSError as error:
            _raise_write_error(self.path, error)

    def append(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Writes one row and returns it as written (NaN and infinity became ``None``).

        Raises:
            MetricsError: the file cannot be written (full disk); what was written of this row is taken back.
        """
        clean = clean_row(row)
        line = (json.dumps(clean) + "\n").encode()
        start = os.fstat(self._file.fileno()).st_size
        try:
            self._write_whole(line)
        except OSError as error:
            os.ftruncate(self._file.fileno(), start)  # shrinking needs no space
            _raise_write_error(self.path, error)
        return clean

    def truncate_after(self, step: int) -> int:
        """Drops rows of later steps, so that a resumed run's file equals an uninterrupted one. Returns how many.

        The new file replaces the old one in one rename: a kill leaves either, never a mix.
        """
        rows = read_metrics(self.path)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) == len(rows):
            return 0
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(temporary, self.path)
            self._file.close()
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            _raise_write_error(self.path, error)
        return len(rows) - len(kept)

    def close(self) -> None:
        self._file.close()

    def _write_whole(self, line: bytes) -> None:
        """On a nearly full disk one ``write`` may take only part of the line; the next then raises."""
        while line:
            line = line[self._file.write(line) :]

    def _drop_torn_line(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logger.warning("%s: dropped a half-written last line (%d bytes)", self.path, len(data) - whole)
            os.ftruncate(self._file.fileno(), whole)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, in order; a half-written last line is left out.

    Raises:
        MetricsError: no such file, or a whole line that is not a JSON object with an integer ``step``.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise MetricsError(f"cannot read metrics file {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            start = line[:60].decode(errors="replace")
            raise MetricsError(
                f"{path} line {number} is not a metrics row (a JSON object with an integer `step`): {start!r}. "
                "Delete that line, or choose another --output-dir."
            )
        rows.append(row)
    return rows


def clean_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as JSON knows them: tensors and numpy scalars become Python numbers, NaN and infinity ``None``."""
    clean: dict[str, Any] = {}
    lost = []
    for name, value in row.items():
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            lost.append(f"{name}={value}")
            value = None
        clean[name] = value
    if lost:
        logger.warning("step %s: not a finite number, recorded as null: %s", row.get("step"), ", ".join(lost))
    if not isinstance(clean.get("step"), int):
        raise ValueError(f"a metrics row needs an integer `step`, got {clean.get('step')!r}")
    return clean


def _raise_write_error(path: Path, error: OSError) -> NoReturn:
    raise MetricsError(
        f"cannot write metrics file {path}: {error.strerror}. Without it the run would leave no record: free some "
        "space or fix the permissions (or choose another --output-dir), then start again with --load to resume."
    ) from error
