"""Training data from the mixture: problems in, filtered answers with their log-probs out, resumable.

Rounds: sample with the student as ``theta``, train it on the file, sample again with the trained student as ``theta``
and the next ``round``. ``tools/generate_mixture_data.py`` is this as a command.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Protocol

from opd.decoding.stats import MixtureStats
from opd.errors import UserError
from opd.sampling.data_plan import DataSettings, read_plan
from opd.sampling.filters import FILTER_FLAG, Filter, FilterError, Judge
from opd.sampling.output import MixtureSample
from opd.sampling.record_files import RecordFiles, Totals, write_summary
from opd.sampling.records import Job, RecordMaker

logger = logging.getLogger(__name__)

CHUNK = 4096  # answers asked for at once: bounds the memory of tokenized prompts; slots idle only at a chunk's end
PATIENCE = 16  # errors of a filter before its first verdict until it is held broken


class SampleSource(Protocol):
    """What the generator needs of ``OptimalSampler``."""

    tokenizer: Any

    def stream(
        self,
        prompts: Sequence[Any],
        theta_prompts: Sequence[Any],
        *,
        keys: Sequence[int],
        prefixes: Sequence[Sequence[int]],
        **options: Any,
    ) -> Iterator[tuple[int, MixtureSample]]:
        """(place, sample) in any order; ``options``: those of ``Sampling``, ``progress`` and ``counters``."""


@dataclass(kw_only=True)
class RunState:
    """How far a run is; ``totals`` are of the files, the rest of this run."""

    wanted: int  # answers that were not in the files at its start
    totals: Totals
    finished: int = 0
    failed: int = 0  # answers that the engine could not write: in no file, tried again at the next start
    first_failure: str | None = None
    tokens: int = 0
    alpha_sum: float = 0.0
    alphas: int = 0


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """``kept``, ``dropped``, ``tokens`` and ``alpha_mean`` are of everything in the files, the rest of this run."""

    kept: int
    dropped: dict[str, int]  # reason -> answers, most frequent first
    tokens: int  # sampled tokens of kept answers
    alpha_mean: float | None  # of kept answers
    found: int  # answers that were in the files already
    written: int  # answers of this run, kept or dropped
    failed: int
    run_tokens: int  # sampled by this run, dropped answers included
    seconds: float
    tokens_per_second: float
    acceptance: float | None  # share of the student's drafts that were kept
    tokens_per_round: float | None


def generate_mixture_data(
    settings: DataSettings,
    open_source: Callable[[], SampleSource],
    *,
    overwrite: bool = False,
    on_sample: Callable[[RunState], None] | None = None,
) -> DataSummary:
    """Writes what the output lacks.

    Args:
        open_source: loads the models; called after everything else has been checked, and only if answers are lacking.
        overwrite: make everything anew.
        on_sample: called after every finished answer.

    Raises:
        UserError: flags, files or rows that cannot be used; a filter that judges no record; no answer could be written.
    """
    plan = read_plan(settings)
    filters = settings.filters.filters()
    with RecordFiles(settings.paths, settings.manifest(plan.rows), overwrite=overwrite) as files:
        found = len(files.done)
        jobs = [job for job in plan.jobs() if job.id not in files.done]
        run = _Run(settings, files, filters, wanted=len(jobs))
        counters, seconds = MixtureStats(), 0.0
        if jobs:
            source = open_source()
            started = time.monotonic()
            for state in run.write(source, jobs, counters):
                if on_sample is not None:
                    on_sample(state)
            seconds = time.monotonic() - started
        summary = _summary(run.state, counters, found=found, seconds=seconds)
    write_summary(settings.paths, asdict(summary))
    return summary


class _Run:
    def __init__(self, settings: DataSettings, files: RecordFiles, filters: list[Filter], *, wanted: int) -> None:
        self.state = RunState(wanted=wanted, totals=files.totals)
        self._settings, self._files, self._judge = settings, files, Judge(filters)
        self._unjudged: list[tuple[dict[str, Any], FilterError]] = []  # by a filter that has judged none so far

    def write(self, source: SampleSource, jobs: list[Job], counters: MixtureStats) -> Iterator[RunState]:
        settings = self._settings
        maker = RecordMaker(
            tokenizer=source.tokenizer,
            format=settings.format,
            theta_system_prompt=settings.sampler.get("theta_system_prompt"),
            seed=settings.sampling.seed,
            teacher=settings.teacher,
            theta=settings.theta,
            keep_alphas=settings.track_alpha,
        )
        for start in range(0, len(jobs), CHUNK):
            chunk = jobs[start : start + CHUNK]
            prefixes = [job.prefix.ids(source.tokenizer) for job in chunk]
            samples = source.stream(
                [job.teacher_prompt for job in chunk],
                [job.theta_prompt for job in chunk],
                keys=[job.key for job in chunk],
                prefixes=prefixes,
                progress=False,
                counters=counters,
                **asdict(settings.sampling),
            )
            for index, sample in samples:
                self._take(maker, chunk[index], sample, prefixes[index])
                yield self.state
        self._finish()

    def _take(self, maker: RecordMaker, job: Job, sample: MixtureSample, prefix_ids: list[int]) -> None:
        state = self.state
        state.finished += 1
        if sample.error is not None:
            state.failed += 1
            state.first_failure = state.first_failure or f"{job.id}: {sample.error}"
            return
        state.tokens += len(sample.response_ids)
        record = maker.make(job, sample, prefix_ids)
        written = maker.formatted(record, job)
        try:
            reason = self._judge(record | {"fields": job.fields})
        except FilterError as error:
            logger.warning("%s is dropped: %s", job.id, error)
            self._unjudged.append((written, error))
            if len(self._unjudged) >= PATIENCE:
                self._drop_unjudged()
        else:
            self._drop_unjudged()
            if reason is None:
                self._files.keep(written)
            else:
                self._files.drop(written, reason)

    def _drop_unjudged(self) -> None:
        """An answer that a filter fails on is dropped; but a filter that judges no answer at all is itself at fault."""
        held = []
        for record, error in self._unjudged:
            if error.name in self._judge.working:
                self._files.drop(record, error.kind)
            else:
                held.append((record, error))
        self._unjudged = held
        if len(held) >= PATIENCE:
            self._refuse_filter()

    def _finish(self) -> None:
        state = self.state
        self._drop_unjudged()
        if self._unjudged:
            self._refuse_filter()
        if state.failed == state.wanted:
            raise UserError(f"None of the {state.wanted} answers could be written. {state.first_failure}")
        if state.failed:
            logger.warning(
                "%d of %d answers could not be written, and will be tried again by the same command; the first is %s",
                *(state.failed, state.wanted, state.first_failure),
            )

    def _refuse_filter(self) -> NoReturn:
        record, error = self._unjudged[0]
        raise UserError(
            f"{error} on {record['id']}, and it judged none of the {len(self._unjudged)} answers that reached it. None "
            f"of them is counted as dropped. Mend the function of `{FILTER_FLAG}` (it gets one record, a dict) and "
            "start again."
        ) from error


def _summary(state: RunState, counters: MixtureStats, *, found: int, seconds: float) -> DataSummary:
    totals = state.totals
    return DataSummary(
        kept=totals.kept,
        dropped=dict(totals.dropped.most_common()),
        tokens=totals.tokens,
        alpha_mean=totals.alpha_sum / totals.alphas if totals.alphas else None,
        found=found,
        written=state.finished - state.failed,
        failed=state.failed,
        run_tokens=state.tokens,
        seconds=seconds,
        tokens_per_second=state.tokens / seconds if seconds > 0 else 0.0,
        acceptance=counters.acceptance,
        tokens_per_round=counters.tokens_per_round,
    )
