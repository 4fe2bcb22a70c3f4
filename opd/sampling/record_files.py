"""The output file and what lies beside it, written so that a kill at any moment loses nothing and repeats nothing.

    OUTPUT                  kept records, one line each
    OUTPUT.progress.jsonl   ids of dropped ones, with the reason: without them a restart would write these answers again
    OUTPUT.manifest.json    the settings that the records hang on
    OUTPUT.summary.json     counts of the last run that came to its end

Every line is flushed as a whole; a line that a kill tore is cut off at the next start and its answer written again, to
the same text, for its random draws hang on its id.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from opd.config.flags import ConfigError
from opd.sampling.records import ID, REASON

logger = logging.getLogger(__name__)

OVERWRITE = "--overwrite"
BLOCK = 1 << 20  # bytes read at once from the end of a file
Dropped = tuple[str, str]


@dataclass(kw_only=True)
class Totals:
    """Of everything that is in the files."""

    kept: int = 0
    tokens: int = 0  # of kept answers, sampled
    alpha_sum: float = 0.0  # of their alpha means
    alphas: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> answers

    def add_kept(self, record: dict[str, Any]) -> None:
        self.kept += 1
        self.tokens += len(record["response"]) - record["prefix_length"]
        if record["alpha_mean"] is not None:
            self.alpha_sum += record["alpha_mean"]
            self.alphas += 1


@dataclass(frozen=True)
class RecordPaths:
    """``dropped``: file for the records that filters drop, if they are kept at all."""

    output: Path
    dropped: Path | None = None

    @property
    def progress(self) -> Path:
        return self._beside("progress.jsonl")

    @property
    def manifest(self) -> Path:
        return self._beside("manifest.json")

    @property
    def summary(self) -> Path:
        return self._beside("summary.json")

    def check(self) -> None:
        """
        Raises:
            ConfigError: a file cannot be written there.
        """
        for flag, path in (("--output", self.output), ("--dropped", self.dropped)):
            if path is None:
                continue
            if path.suffix != ".jsonl":
                raise ConfigError(f"`{flag}={path}`: the name must end in .jsonl, by which readers know what it holds.")
            if path.is_dir():
                raise ConfigError(f"`{flag}={path}` is a folder. Give the name of a file in it.")
            if not path.parent.is_dir():
                raise ConfigError(f"`{flag}={path}`: there is no folder {path.parent}. Make it: mkdir -p {path.parent}")
            if not os.access(path.parent, os.W_OK):
                raise ConfigError(f"`{flag}={path}`: the folder {path.parent} cannot be written to. Choose another.")
        if self.dropped is not None and self.dropped.absolute() == self.output.absolute():
            raise ConfigError(
                f"`--dropped={self.dropped}` is `--output` itself. Give the dropped records another file."
            )

    def _beside(self, suffix: str) -> Path:
        return self.output.with_name(f"{self.output.name}.{suffix}")


class RecordFiles:
    """Open for appending, by one process at a time; a context manager.

    Args:
        settings: what the records hang on, as JSON has it.
        overwrite: delete what an earlier run left.

    Attributes:
        done: ids that are in the files, kept or dropped.
        totals: counted from the files, and counted up.

    Raises:
        ConfigError: the files belong to other settings, are being written by another process, or are damaged.
    """

    def __init__(self, paths: RecordPaths, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self._paths = paths
        self.done: set[str] = set()
        self.totals = Totals()
        is_new = not paths.progress.exists()
        self._progress = paths.progress.open("ab")  # holds the lock
        try:
            lock(self._progress, self._paths.output)
            if overwrite:
                self._remove_all()
            self._check_manifest(settings)
            write_whole(paths.manifest, settings)
            self._recover()
            self._output = paths.output.open("ab")
            self._dropped = paths.dropped.open("ab") if paths.dropped is not None else None
        except BaseException:
            self._progress.close()
            if is_new:
                paths.progress.unlink()
            raise

    def __enter__(self) -> RecordFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._output, self._dropped, self._progress):
            if file is not None:
                file.close()

    def keep(self, record: dict[str, Any]) -> None:
        _append(self._output, record)
        self.done.add(record[ID])
        self.totals.add_kept(record)

    def drop(self, record: dict[str, Any], reason: str) -> None:
        """The record first: a kill between the two lines is seen at the next start by its id."""
        if self._dropped is not None:
            _append(self._dropped, record | {REASON: reason})
        self._note_dropped(record[ID], reason)

    def _note_dropped(self, record_id: str, reason: str) -> None:
        _append(self._progress, {ID: record_id, REASON: reason})
        self.done.add(record_id)
        self.totals.dropped[reason] += 1

    def _remove_all(self) -> None:
        paths = self._paths
        for path in (paths.manifest, paths.output, paths.summary, paths.dropped):  # the manifest first: see its check
            if path is not None:
                path.unlink(missing_ok=True)
        self._progress.truncate(0)

    def _check_manifest(self, settings: dict[str, Any]) -> None:
        paths = self._paths
        shown = f"`--output={paths.output}`"
        if not paths.manifest.exists():
            for flag, path in (("--output", paths.output), ("--dropped", paths.dropped)):
                if path is not None and path.exists() and path.stat().st_size:
                    raise ConfigError(
                        f"`{flag}={path}` exists without {paths.manifest.name}, so it is not known how it was made. "
                        f"Give another file, or `{OVERWRITE}` to replace it."
                    )
            return
        try:
            found = json.loads(paths.manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{shown}: {paths.manifest.name} is damaged. Give `{OVERWRITE}` to make everything anew."
            ) from error
        if not any(
            path.exists() and path.stat().st_size for path in (paths.output, paths.progress, paths.dropped) if path
        ):
            return  # a start that came to nothing, such as one with a mistyped model
        differing = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if differing:
            listed = "; ".join(f"{n}: {_short(found.get(n))} there, {_short(settings.get(n))} now" for n in differing)
            raise ConfigError(
                f"{shown} was made with other settings ({listed}). Give back the old ones to go on with it, another "
                f"file, or `{OVERWRITE}` to make everything anew."
            )

    def _recover(self) -> None:
        paths = self._paths
        for record in _read_back(paths.progress, "--output"):
            self.done.add(record[ID])
            self.totals.dropped[record[REASON]] += 1
        for record in _read_back(paths.output, "--output"):
            self.done.add(record[ID])
            self.totals.add_kept(record)
        for record in _read_back(paths.dropped, "--dropped") if paths.dropped is not None else ():
            if record[ID] not in self.done:  # killed between the two lines of a dropped record
                self._note_dropped(record[ID], record[REASON])


def write_summary(paths: RecordPaths, summary: dict[str, Any]) -> None:
    write_whole(paths.summary, summary)


def _append(file: IO[bytes], record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    file.flush()


def _read_back(path: Path, flag: str) -> Iterator[dict[str, Any]]:
    """The file's records, after a torn last line is cut off."""
    if not path.exists():
        return
    cut_torn_line(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                record[ID]
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(
                    f"`{flag}`: {path}, line {number} is no record of this tool. Mend or delete the line, or give "
                    f"`{OVERWRITE}` to make everything anew."
                ) from error
            yield record


def lock(file: IO[bytes], output: Path) -> None:
    """Raises ConfigError when another process has the lock of ``file``, which goes with ``output``."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"`--output={output}` is being written by another process. Wait for it, stop it, or give another file."
        ) from error


def cut_torn_line(path: Path) -> None:
    """A line without its end came from a kill in the middle of a write."""
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - BLOCK)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            logger.warning("%s: its last line is torn (%d bytes): cut off, to be written again", path, size - end)
            file.truncate(end)


def write_whole(path: Path, value: dict[str, Any]) -> None:
    """Under its name there is always a whole file."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
