"""Scores of a file of responses, ahead of time: rows in, rows with the teacher's log-probs out, resumable.

``tools/score_responses.py`` is this as a command. Every row comes to one end: found in the output from an earlier run,
scored, bad (it cannot be read, or the teacher has no place for it) or unscored (the teacher failed); the last two are
in no file, so the same command tries them again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from opd.errors import TeacherError, UserError
from opd.teachers.response_rows import Row, RowError, RowReader, read_rows_singly
from opd.teachers.score_keys import ScoreRequest, TeacherScore
from opd.teachers.scored_rows import ScoredRows
from opd.teachers.top_scores import TopRequest

logger = logging.getLogger(__name__)

BAD_ROWS_SHOWN = 20
PATIENCE = 16  # samples on end that the teacher fails on before it is held dead: each may cost all its retries


@dataclass(frozen=True, kw_only=True)
class Job:
    row: Row
    prompt_ids: list[int]
    response_ids: list[int]
    request: ScoreRequest


Outcome = tuple[Job, TeacherScore | RowError | TeacherError]


class Scorer(Protocol):
    """A teacher that reads many samples: ``opd.teachers.scorers``."""

    identity: str  # what is known of its weights
    cached: int  # samples so far whose score was stored already

    def stream(self, jobs: Iterator[Job]) -> Iterator[Outcome]:
        """One outcome per job, each as soon as it is there, in any order; reads only a little ahead."""


@dataclass(frozen=True, kw_only=True)
class OfflineSettings:
    """
    Args:
        top_k: likely tokens at every position, 0 for none.
        limit: only the first this many rows.
        overwrite: make everything anew.
    """

    input: Path
    output: Path
    top_k: int = 0
    limit: int | None = None
    overwrite: bool = False


@dataclass(kw_only=True)
class Progress:
    """Of this run; ``on_row`` sees it after every row."""

    found: int = 0  # rows that were in the output already
    scored: int = 0
    bad: int = 0
    unscored: int = 0
    tokens: int = 0  # response tokens scored
    logprob_sum: float = 0.0  # nats
    first_failure: str | None = None

    @property
    def rows(self) -> int:
        return self.found + self.scored + self.bad + self.unscored


@dataclass(frozen=True, kw_only=True)
class OfflineSummary:
    """Of one run."""

    rows: int
    found: int
    scored: int
    bad: int
    unscored: int
    tokens: int
    seconds: float
    tokens_per_second: float
    mean_log_prob: float | None  # nats per token
    cached_share: float | None  # of the scored rows
    first_failure: str | None  # of the teacher


def score_file(
    settings: OfflineSettings,
    reader: RowReader,
    scorer: Scorer,
    *,
    on_row: Callable[[Progress], None] = lambda progress: None,
) -> OfflineSummary:
    """Writes what the output lacks.

    Raises:
        ConfigError: files that cannot be used.
        UserError: no row can be read, or the teacher fails on one sample after the other.
    """
    rows = read_rows_singly(settings.input)
    manifest = {
        "teacher": scorer.identity,
        "input_key": reader.input_key,
        "response_key": reader.response_key,
        "apply_chat_template": reader.apply_chat_template,
        "top_k": settings.top_k,
    }
    started = time.monotonic()
    with ScoredRows(settings.output, manifest, overwrite=settings.overwrite) as output:
        run = _Run(settings, reader, output, on_row)
        for job, result in scorer.stream(run.jobs(rows)):
            run.take(job, result)
        summary = _summary(run.progress, scorer.cached, time.monotonic() - started)
        output.write_summary(asdict(summary))
        run.check_end()
    return summary


class _Run:
    def __init__(
        self, settings: OfflineSettings, reader: RowReader, output: ScoredRows, on_row: Callable[[Progress], None]
    ) -> None:
        self.progress = Progress()
        self._settings, self._reader, self._output, self._on_row = settings, reader, output, on_row
        self._top = TopRequest(count=settings.top_k, vocab_size=reader.vocab_size) if settings.top_k else None
        self._stale = set(output.done)
        self._first_bad: str | None = None
        self._failures_on_end = 0

    def jobs(self, rows: Iterator[Row]) -> Iterator[Job]:
        """The rows that are to be scored; the others are counted on the way."""
        for count, row in enumerate(rows, start=1):
            if self._settings.limit is not None and count > self._settings.limit:
                return
            try:
                if isinstance(row.fields, RowError):
                    raise row.fields
                self._stale.discard(row.id)
                if row.id in self._output.done:
                    self.progress.found += 1
                    self._on_row(self.progress)
                    continue
                prompt_ids, response_ids = self._reader.ids(row.fields)
            except RowError as error:
                self._refuse(row, error)
                continue
            request = ScoreRequest(
                tokens=[*prompt_ids, *response_ids], response_length=len(response_ids), top=self._top
            )
            yield Job(row=row, prompt_ids=prompt_ids, response_ids=response_ids, request=request)
        if self._stale:
            logger.warning(
                "%s: %d of its rows are not in %s any more, where rows changed or went. `--overwrite` drops them",
                *(self._settings.output, len(self._stale), self._settings.input),
            )

    def take(self, job: Job, result: TeacherScore | RowError | TeacherError) -> None:
        progress = self.progress
        if isinstance(result, TeacherError):
            self._fail(job, result)
            return
        try:
            if isinstance(result, RowError):
                raise result
            self._output.add(job.row, job.prompt_ids, job.response_ids, result)
        except RowError as error:
            self._refuse(job.row, error)
            return
        self._failures_on_end = 0
        progress.scored += 1
        progress.tokens += len(result.logprobs)
        progress.logprob_sum += math.fsum(result.logprobs)
        self._on_row(progress)

    def check_end(self) -> None:
        """
        Raises:
            UserError: there were rows and all are bad.
        """
        progress = self.progress
        if progress.bad and progress.bad == progress.rows:
            raise UserError(
                f"`--input={self._settings.input}`: none of its {progress.bad} rows can be scored. {self._first_bad}"
            )

    def _refuse(self, row: Row, error: RowError) -> None:
        self.progress.bad += 1
        text = f"row {row.number}: {error}"
        self._first_bad = self._first_bad or f"The first is {text}"
        if self.progress.bad <= BAD_ROWS_SHOWN:
            logger.warning("%s, %s: left out", self._settings.input, text)
        elif self.progress.bad == BAD_ROWS_SHOWN + 1:
            logger.warning("%s: further bad rows are counted only", self._settings.input)
        self._on_row(self.progress)

    def _fail(self, job: Job, error: TeacherError) -> None:
        self.progress.unscored += 1
        self.progress.first_failure = self.progress.first_failure or f"row {job.row.number}: {error}"
        self._failures_on_end += 1
        self._on_row(self.progress)
        if self._failures_on_end >= PATIENCE:
            raise UserError(
                f"the teacher failed on {self._failures_on_end} samples one after the other, the last one "
                f"row {job.row.number}: {error}. {self.progress.scored} rows of this run are in "
                f"{self._settings.output}; the same command goes on there"
            )


def _summary(progress: Progress, cached: int, seconds: float) -> OfflineSummary:
    return OfflineSummary(
        rows=progress.rows,
        found=progress.found,
        scored=progress.scored,
        bad=progress.bad,
        unscored=progress.unscored,
        tokens=progress.tokens,
        seconds=seconds,
        tokens_per_second=progress.tokens / seconds if seconds > 0 else 0.0,
        mean_log_prob=progress.logprob_sum / progress.tokens if progress.tokens else None,
        cached_share=cached / progress.scored if progress.scored else None,
        first_failure=progress.first_failure,
    )
