"""The file that tools/score_responses.py writes: each row as it came, with its token ids and the teacher's log-probs.

OUTPUT                  one line per scored row, flushed as a whole, in the order in which scores come
OUTPUT.manifest.json    the settings that the scores hang on
OUTPUT.summary.json     counts of the last run that came to its end
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd.config.flags import ConfigError
from opd.sampling.record_files import OVERWRITE, RecordPaths, cut_torn_line, lock, write_whole
from opd.teachers.response_rows import Row, RowError
from opd.teachers.score_keys import TeacherScore
from opd.types import TopLogprobs

ID = "score_id"


class ScoredRows:
    """Open for appending, by one process at a time; a context manager.

    Args:
        settings: what the scores hang on, as JSON has it.
        overwrite: delete what an earlier run left.

    Attributes:
        done: ids of the rows that are in the file.

    Raises:
        ConfigError: the file cannot be written, is of other settings or damaged, or another process writes it.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self._paths = RecordPaths(output)
        self._paths.check()
        self.done: set[str] = set()
        self._file = output.open("ab")
        try:
            lock(self._file, self._paths.output)
            if overwrite:
                self._file.truncate(0)
            elif output.stat().st_size:
                self._check_manifest(settings)
                self._recover()
            write_whole(self._paths.manifest, settings)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ScoredRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: Row, prompt_ids: list[int], response_ids: list[int], score: TeacherScore) -> None:
        """
        Raises:
            RowError: the row holds what JSON has no form for.
        """
        record = {
            **row.fields,
            ID: row.id,
            "prompt_ids": prompt_ids,
            "response_ids": response_ids,
            "teacher_log_probs": _short(score.logprobs),
        }
        if score.top is not None:
            record["teacher_top"] = pack_top(score.top)
        try:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RowError(f"a field has no form in JSON ({error})") from error
        self._file.write(line + b"\n")
        self._file.flush()
        self.done.add(row.id)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_whole(self._paths.summary, summary)

    def _check_manifest(self, settings: dict[str, Any]) -> None:
        shown = f"`--output={self._paths.output}`"
        way_out = f"Give another file, or `{OVERWRITE}` to replace it."
        try:
            found = json.loads(self._paths.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{shown} exists, and how it was made is not known ({error}). {way_out}") from error
        differing = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if differing:
            listed = "; ".join(f"{n}: {found.get(n)} there, {settings.get(n)} now" for n in differing)
            raise ConfigError(f"{shown} was made with other settings ({listed}). {way_out}")

    def _recover(self) -> None:
        cut_torn_line(self._paths.output)
        with self._paths.output.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    self.done.add(json.loads(line)[ID])
                except (ValueError, TypeError, KeyError) as error:
                    raise ConfigError(
                        f"`--output={self._paths.output}`: line {number} is no row of this tool. Mend or delete the "
                        f"line, or give `{OVERWRITE}`."
                    ) from error


def pack_top(top: TopLogprobs) -> dict[str, Any]:
    """[T, K] ids and log-probs as base64 of little-endian int32 and float32: 11 bytes an entry, a third of JSON's."""
    arrays = {"ids": top.ids_TK.numpy().astype("<i4"), "log_probs": top.logprobs_TK.numpy().astype("<f4")}
    packed = {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}
    return {"count": int(top.ids_TK.shape[1]), **packed}


def unpack_top(packed: dict[str, Any]) -> TopLogprobs:
    """Of a row's ``teacher_top``."""
    ids, values = (
        np.frombuffer(base64.b64decode(packed[name]), dtype=dtype).reshape(-1, packed["count"])
        for name, dtype in (("ids", "<i4"), ("log_probs", "<f4"))
    )
    return TopLogprobs(
        ids_TK=torch.from_numpy(ids.astype(np.int32)), logprobs_TK=torch.from_numpy(values.astype(np.float32))
    )


def _short(values: list[float]) -> list[float]:
    """As few digits as tell one float32 from another."""
    return [float(str(value)) for value in np.asarray(values, dtype=np.float32)]
