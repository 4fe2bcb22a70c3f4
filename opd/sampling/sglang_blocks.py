"""The mixture of two models that are too large for one process: each on its own SGLang server.

One answer is written in blocks. The student's server drafts k tokens and sends its K likeliest at each; the teacher's
server scores them in one request that computes these k positions only, its prefix cache serving the rest; here the
drafts are kept or replaced so that every token has the distribution ``q`` of ``opd.sampling.sparse_mixture``. Many
answers are in flight, so that the servers work on some while others are on the wire or with the other server.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from opd.background_loop import BackgroundLoop
from opd.decoding.draft_length import DraftLength
from opd.decoding.loop import prompt_problem
from opd.sampling.block_answers import BlockStats, Judge, WrittenAnswer
from opd.sampling.block_drafts import (
    BlockError,
    BlockServer,
    draft_block,
    score_block,
    within_vocabulary,
    without_others,
)
from opd.sampling.block_length import BlockLength
from opd.sampling.sparse_mixture import DraftedBlock
from opd.serving.http import JsonClient, base_url
from opd.types import GenerationRequest, GenerationResult, Mixture, SampleStatus, SamplingParams

logger = logging.getLogger(__name__)

LONGEST_DRAFT = 24  # tokens, when the length is adapted


class SGLangMixture:
    """Exact for the distribution that each model's K likeliest tokens define: ``q`` is the mixture of the student's and
    the teacher's top K, each renormalised. As K grows to the vocabulary it becomes the mixture of the whole models.

    The verdict on each draft and the replacement of a rejected one are drawn from (seed, request key, position). The
    drafts are drawn by the student's server, from noise of its own: two runs of one seed differ.

    Args:
        student_url, teacher_url: the servers' addresses.
        top_k: K.
        draft_tokens: of a block; None: adapted to the measured acceptance and times.
        concurrency: answers in flight.
        max_context_len: tokens of the student's prompt and the answer.
        teacher_max_context_len: of the teacher's; as the student's without it.
        timeout_s: for one attempt of one request.
        retries: further attempts on connection errors, time-outs and 5xx answers.
        weight_version: of results, where the student's server names none.
        vocab_size: tokens that both models have. A request for more likely tokens than a model has, or with an id that
            it does not have, ends an SGLang server (seen on 0.5.23); with ``vocab_size`` the first is cut to it and the
            second refused.
    """

    def __init__(
        self,
        student_url: str,
        teacher_url: str,
        *,
        top_k: int = 64,
        draft_tokens: int | None = None,
        concurrency: int = 64,
        max_context_len: int,
        teacher_max_context_len: int | None = None,
        timeout_s: float = 600.0,
        retries: int = 3,
        api_key: str | None = None,
        weight_version: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        for name, value in (("top_k", top_k), ("draft_tokens", draft_tokens), ("concurrency", concurrency)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.top_k = top_k if vocab_size is None else min(top_k, vocab_size)
        self._vocab_size = vocab_size
        self.weight_version = weight_version
        self.stats = BlockStats()
        self._student, self._teacher = (
            BlockServer(name, JsonClient(base_url(url), timeout_s, retries, concurrency, api_key))
            for name, url in (("student", student_url), ("teacher", teacher_url))
        )
        self._contexts = (max_context_len, teacher_max_context_len or max_context_len)
        self._concurrency = concurrency
        self._length = BlockLength(DraftLength(draft_tokens, longest=LONGEST_DRAFT))
        self._loop = BackgroundLoop("sglang mixture")

    def generate(
        self, requests: list[GenerationRequest], params: SamplingParams, mixture: Mixture
    ) -> Iterator[GenerationResult]:
        """Yields one result per request, each as soon as it is finished; one that cannot be written is ABORTED, carries
        its ``error`` and what was written before, and the others go on.

        ``params.top_k`` sets a smaller K than ``top_k``; ``params.top_p`` applies within the K tokens of either model.
        What the results' log-probs of student and teacher are: ``opd.sampling.sparse_mixture.JudgedBlock``.

        Raises:
            ValueError: sampling parameters for which ``q`` is not known from K tokens.
            EngineError: nothing answers at a server's address any more.
        """
        self._check(params)
        return self._results(requests, params, mixture)

    def close(self) -> None:
        """Safe to call twice."""
        self._loop.close()

    def _check(self, params: SamplingParams) -> None:
        if not params.temperature > 0:
            raise ValueError(
                f"temperature={params.temperature} must be above 0 to draw from a mixture: at 0 each model has a "
                "single token, and where the two differ there is nothing to mix"
            )
        if params.top_k > self.top_k:
            raise ValueError(
                f"top_k={params.top_k} asks for more likely tokens than the {self.top_k} that the servers send. Make "
                f"the SGLangMixture with top_k={params.top_k}"
            )
        if not 0 < params.top_p <= 1:
            raise ValueError(f"top_p={params.top_p} must be above 0 and at most 1 (1: off)")
        if params.top_ids > self._kept(params):
            raise ValueError(
                f"top_ids={params.top_ids} asks to report more likely tokens than the {self._kept(params)} that the "
                "student's server sends"
            )

    def _kept(self, params: SamplingParams) -> int:
        return params.top_k if params.top_k > 0 else self.top_k

    def _check_ids(self, prompts: Iterable[Sequence[int]]) -> None:
        """
        Raises:
            BlockError: an id that would end a server.
        """
        largest = max(max(prompt) for prompt in prompts)
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise BlockError(f"a prompt has id {largest}, and the models have {self._vocab_size} tokens in common")

    def _results(
        self, requests: list[GenerationRequest], params: SamplingParams, mixture: Mixture
    ) -> Iterator[GenerationResult]:
        finished: queue.SimpleQueue[GenerationResult | BaseException] = queue.SimpleQueue()
        started = time.perf_counter()
        before = self._bytes()
        work = self._loop.submit(self._write_all(requests, params, mixture, finished.put))
        try:
            for _ in requests:
                result = finished.get()
                if isinstance(result, BaseException):
                    raise result
                self.stats.tokens += len(result.response_ids)
                yield result
        finally:
            work.cancel()
            self.stats.seconds += time.perf_counter() - started
            self.stats.bytes += self._bytes() - before

    def _bytes(self) -> int:
        return self._student.client.stats.bytes + self._teacher.client.stats.bytes

    async def _write_all(
        self, requests: list[GenerationRequest], params: SamplingParams, mixture: Mixture, put: Callable[[Any], None]
    ) -> None:
        """Puts one result per request, or the first error and nothing more."""
        slots = asyncio.Semaphore(self._concurrency)
        judge = Judge(params, mixture)

        async def one(request: GenerationRequest) -> None:
            async with slots:
                put(await self._write_one(request, params, judge))

        try:
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    group.create_task(one(request))
        except BaseExceptionGroup as errors:
            put(errors.exceptions[0])

    async def _write_one(self, request: GenerationRequest, params: SamplingParams, judge: Judge) -> GenerationResult:
        prompts = _prompts(request)
        problem = prompt_problem([len(prompt) for prompt in prompts], self._contexts)
        if problem is not None:
            return GenerationResult(
                key=request.key,
                response_ids=[],
                log_probs=[],
                status=SampleStatus.ABORTED,
                weight_version=self.weight_version,
                error=problem,
            )
        room = [context - len(prompt) for context, prompt in zip(self._contexts, prompts, strict=True)]
        answer = WrittenAnswer(
            request=request, limit=min(params.max_new_tokens, *room), params=params, weight_version=self.weight_version
        )
        try:
            self._check_ids(prompts)
            with self._length.answering():
                while len(answer.ids) < answer.limit:
                    await self._write_block(answer, params, judge)
                    if answer.ids[-1] in params.stop_token_ids:
                        return answer.result(SampleStatus.COMPLETED)
        except BlockError as error:
            logger.warning("request %d aborted: %s", request.key, error)
            return answer.result(SampleStatus.ABORTED, error=str(error))
        return answer.result(SampleStatus.TRUNCATED)

    async def _write_block(self, answer: WrittenAnswer, params: SamplingParams, judge: Judge) -> None:
        top_k = self._kept(params)
        started = time.perf_counter()
        planned = self._length.choose()
        student_tokens, teacher_tokens = ([*prompt, *answer.ids] for prompt in _prompts(answer.request))
        draft = await draft_block(
            self._student,
            student_tokens,
            count=min(planned, answer.limit - len(answer.ids)),
            temperature=params.temperature,
            stop_token_ids=params.stop_token_ids,
            top_k=top_k,
        )
        sent = draft.ids
        if self._vocab_size is not None:
            draft, sent = within_vocabulary(draft, self._vocab_size)
        count = len(draft.ids)
        teacher = await score_block(self._teacher, teacher_tokens + sent, count=count, top_k=top_k)
        if self._vocab_size is not None:
            teacher = without_others(teacher, self._vocab_size, "teacher")
        here = slice(len(answer.ids), len(answer.ids) + count)
        block = await judge(
            DraftedBlock(
                student=draft.likely,
                teacher=teacher,
                drafts=draft.ids,
                verdict_noise_B=answer.noise[0][here],
                replacement_noise_B=answer.noise[1][here],
            )
        )
        seconds = time.perf_counter() - started
        self._length.observe(planned, count, seconds=seconds, judged=block.judged, accepted=block.accepted)
        self.stats.add_block(count, block)
        answer.add(draft, block, top_ids=params.top_ids)


def _prompts(request: GenerationRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The student's and the teacher's."""
    given = request.teacher_prompt_ids
    return request.prompt_ids, request.prompt_ids if given is None else given
