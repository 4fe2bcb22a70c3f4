"""Where the two models are: in this process, or on two SGLang servers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from opd.decoding.draft_length import DraftLength
from opd.decoding.mixture import write_mixture
from opd.decoding.stats import MixtureStats
from opd.sampling.arguments import ArgumentError, EngineSettings
from opd.sampling.load_models import ModelSource, load_pair
from opd.sampling.running_requests import running_requests
from opd.sampling.tokenizer_match import vocabulary_width
from opd.types import GenerationRequest, GenerationResult, Mixture, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SERVED_CONCURRENCY = 64  # requests in flight when none are named: both servers stay busy


class LocalModels:
    """Two transformers models in this process, or one with two views.

    Raises:
        ArgumentError: a context beyond the models' positions, a head narrower than the vocabulary, weights that cannot
            be loaded.
    """

    def __init__(
        self,
        student: ModelSource,
        teacher: ModelSource,
        tokenizer: PreTrainedTokenizerBase,
        settings: EngineSettings,
        mixture: Mixture,
        *,
        dtype: Any,
        device: Any,
    ) -> None:
        (student_head, student_positions), (teacher_head, teacher_positions) = student.shape, teacher.shape
        self._vocab_size = vocabulary_width(tokenizer, student=student_head, teacher=teacher_head)
        self._max_context_lens = tuple(
            _context_len(source, positions, settings.max_context_len)
            for source, positions in ((student, student_positions), (teacher, teacher_positions))
        )  # (student's, teacher's)
        self._settings, self._mixture = settings, mixture
        self._draft_length = DraftLength(settings.draft_tokens)  # what it measures serves the next call too
        self._student, self._teacher = load_pair(student, teacher, dtype=dtype, device=device)

    def generate(
        self, requests: list[GenerationRequest], params: SamplingParams, counters: MixtureStats
    ) -> Iterator[GenerationResult]:
        settings = self._settings
        longest = max(max(len(r.prompt_ids), len(r.teacher_prompt_ids or ())) for r in requests)
        rows = running_requests(
            [self._student, self._teacher],
            limit=settings.max_running_requests,
            requests=len(requests),
            tokens=min(longest + params.max_new_tokens, max(self._max_context_lens)),
            vocab_size=self._vocab_size,
            draft_tokens=self._draft_length.longest,
            utilization=settings.gpu_memory_utilization,
        )
        return write_mixture(
            self._student,
            self._teacher,
            requests,
            params,
            self._mixture,
            engine=settings.engine,
            draft_tokens=self._draft_length,
            vocab_size=self._vocab_size,
            max_running_requests=rows,
            max_context_len=self._max_context_lens[0],
            teacher_max_context_len=self._max_context_lens[1],
            stats=counters,
        )

    def close(self) -> None:
        """Nothing was started."""


class ServedModels:
    """Two SGLang servers; exact for the distributions that the ``top_k`` likeliest tokens of each model define.

    Raises:
        ArgumentError: an engine that the servers' protocol does not have.
        TeacherError: a server that does not fit the tokenizer.
    """

    def __init__(
        self,
        student: ModelSource,
        teacher: ModelSource,
        tokenizer: PreTrainedTokenizerBase,
        settings: EngineSettings,
        mixture: Mixture,
        *,
        top_k: int,
    ) -> None:
        from opd.sampling.served_models import check_server
        from opd.sampling.sglang_blocks import SGLangMixture

        if settings.engine != "speculative":
            raise ArgumentError(
                f'`engine={settings.engine!r}` needs the models in this process; over servers there is "speculative" '
                "alone. Drop `engine`, or give folders."
            )
        for source in (student, teacher):
            check_server(source.name, str(source.url), tokenizer)
        self._mixture = mixture
        student_context, teacher_context = (
            _context_len(source, source.served_positions, settings.max_context_len) for source in (student, teacher)
        )
        self._servers = SGLangMixture(
            str(student.url),
            str(teacher.url),
            top_k=top_k,
            vocab_size=len(tokenizer),
            draft_tokens=settings.draft_tokens,
            concurrency=settings.max_running_requests or SERVED_CONCURRENCY,
            max_context_len=student_context,
            teacher_max_context_len=teacher_context,
        )

    def generate(
        self, requests: list[GenerationRequest], params: SamplingParams, counters: MixtureStats
    ) -> Iterator[GenerationResult]:
        if params.top_k > self._servers.top_k:
            raise ArgumentError(
                f"`top_k={params.top_k}` asks for more tokens than the {self._servers.top_k} that the servers send. "
                f"Make the sampler with `server_top_k={params.top_k}`."
            )
        results = self._servers.generate(requests, params, self._mixture)
        return self._counted(results, replace(self._servers.stats), counters)

    def close(self) -> None:
        self._servers.close()

    def _counted(
        self, results: Iterator[GenerationResult], before: MixtureStats, counters: MixtureStats
    ) -> Iterator[GenerationResult]:
        """The servers' counters run on over all calls: adds what this one did."""
        try:
            yield from results
        finally:
            for field in fields(MixtureStats):
                gained = getattr(self._servers.stats, field.name) - getattr(before, field.name)
                setattr(counters, field.name, getattr(counters, field.name) + gained)


def _context_len(source: ModelSource, positions: int | None, limit: int | None) -> int:
    if positions is None and limit is None:
        raise ArgumentError(
            f"`{source.name}={source.url}` serves a model whose config.json is not on this machine, so its context is "
            "not known. Give `max_context_len`."
        )
    if positions is None:
        return limit
    if limit is not None and limit > positions:
        raise ArgumentError(
            f"`max_context_len={limit}` is more than the {positions} positions of `{source.name}`. Lower it, or drop "
            "it to use all positions."
        )
    return limit or positions
