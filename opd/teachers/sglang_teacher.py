"""HTTP client of a teacher served by SGLang: log-probs of a sample's response tokens, and of likely other ones.

The teacher may have several addresses (``opd.serving.endpoint_pool``). While none of them works, samples wait.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import torch

from opd.config.student_support import positions_per_request
from opd.errors import TeacherError
from opd.serving.addresses import addresses
from opd.serving.endpoint_pool import EndpointPool, PoolSettings, PoolStats
from opd.serving.http import HttpError
from opd.serving.top_logprobs import top_request
from opd.serving.turns import Job
from opd.teachers import top_scores
from opd.teachers.score_batches import BatchLimits, ScoreBatcher
from opd.teachers.top_scores import Rows, TopRequest
from opd.types import TopLogprobs

# Prompts whose first score is in flight or done. It only bounds memory: forgetting one costs one prefill.
REMEMBERED_PROMPTS = 4096

# Nats. A near-certain token's log-prob may round to just above 0; a masked logit is the lowest number of its type.
HIGHEST_LOGPROB = 1e-3
LOWEST_LOGPROB = -1e30

T = TypeVar("T")


class TeacherScoreError(TeacherError):
    """One sample that got no score.

    Attributes:
        reason: "unreachable", "timeout", "http_status", "bad_json", "shape", "length", "ids", "not_finite",
            "positive", "top" or "prompt".
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class SGLangTeacher:
    """
    Args:
        url: the server's address, with or without ``/generate``; several of the same model with commas between them,
            each with ``*WEIGHT`` behind it or without.
        timeout_s: for one attempt.
        retries: further attempts on time-outs, 500 answers and truncated JSON.
        concurrency: requests in flight at each address.
        deadline_s: for one sample, or each piece of one that is asked about in pieces. A server that cannot be reached,
            or says that it is busy, is waited for that long.
        hedge: with several addresses, ask a second one after this many times the median latency; 0: never.
        ca_file: PEM file with the certificates to trust in place of the system's.
        lead_prompts: let the first score of each distinct prompt finish before its siblings are sent, so that they
            find the prompt in the server's prefix cache.
        batches: what goes as one request at most, of the samples that wait for an address at the same time.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        retries: int = 3,
        concurrency: int = 64,
        api_key: str | None = None,
        deadline_s: float = 300.0,
        hedge: float = 3.0,
        ca_file: str | None = None,
        lead_prompts: bool = True,
        batches: BatchLimits | None = None,
    ) -> None:
        settings = PoolSettings(
            timeout_s=timeout_s,
            retries=retries,
            concurrency=concurrency,
            api_key=api_key,
            ca_file=ca_file,
            deadline_s=deadline_s,
            hedge_factor=hedge,
        )
        self.http = EndpointPool(addresses(url), settings, through=lambda post: ScoreBatcher(post, batches).post)
        self._lead_prompts = lead_prompts
        self._led: OrderedDict[int, asyncio.Future[None]] = OrderedDict()  # hash of a prompt's ids -> first score done

    @property
    def stats(self) -> PoolStats:
        return self.http.stats

    async def score(self, tokens: list[int], response_length: int) -> list[float]:
        """Log-probs of the last ``response_length`` tokens at temperature 1, in nats.

        Raises:
            TeacherScoreError: the server could not be asked, or its answer does not fit the tokens.
        """
        if response_length == 0:
            return []
        return await self._after_leader(tokens, response_length, lambda job: self._score(tokens, response_length, job))

    async def score_top(
        self, tokens: list[int], response_length: int, request: TopRequest, student_ids: torch.Tensor | None = None
    ) -> tuple[list[float], TopLogprobs]:
        """The same, with the log-probs of likely tokens at each of these positions.

        Args:
            student_ids: the student's K likeliest at each response token [T, K], for the supports that hold them.

        Raises:
            TeacherScoreError: see ``score``.
        """
        if request.of_student:
            if student_ids is None or tuple(student_ids.shape) != (response_length, request.count):
                raise TeacherScoreError(
                    "top", f"the rollout engine reported no {request.count} likeliest ids at each response token"
                )
        return await self._after_leader(
            tokens, response_length, lambda job: self._score_top(tokens, response_length, request, student_ids, job)
        )

    async def close(self) -> None:
        await self.http.close()

    async def _after_leader(self, tokens: list[int], response_length: int, score: Callable[[Job], Awaitable[T]]) -> T:
        """Scores when the first score of the same prompt is done, so that its prefix is in the server's cache."""
        prompt_length = len(tokens) - response_length
        if response_length < 1 or prompt_length < 1:
            raise TeacherScoreError(
                "prompt", f"{len(tokens)} tokens, {response_length} of them response, leave no prompt before it"
            )
        prompt = hash(tuple(tokens[:prompt_length]))
        job = self.http.job(prefix=prompt)
        if not self._lead_prompts:
            return await score(job)

        led = self._led.get(prompt)
        if led is not None:
            await self._asking(self.http.until(led, job))
            return await score(job)
        led = self._led[prompt] = asyncio.get_running_loop().create_future()
        if len(self._led) > REMEMBERED_PROMPTS:
            self._led.popitem(last=False)
        try:
            return await score(job)
        finally:
            led.set_result(None)

    async def _score(self, tokens: list[int], response_length: int, job: Job) -> list[float]:
        return await self._read(
            _score_request(tokens, start=len(tokens) - response_length - 1),
            lambda answer: response_logprobs(answer, tokens, response_length),
            job,
        )

    async def _score_top(
        self,
        tokens: list[int],
        response_length: int,
        request: TopRequest,
        student_ids: torch.Tensor | None,
        job: Job,
    ) -> tuple[list[float], TopLogprobs]:
        prompt_length = len(tokens) - response_length
        step = positions_per_request(response_length, request.count) if request.of_student else response_length
        logprobs: list[float] = []
        chunks: list[list[Rows]] = []
        for first in range(0, response_length, step):
            end = min(first + step, response_length)
            if first:  # the server has just answered: a long answer has many pieces, and is not late for that
                job = self.http.job(prefix=job.prefix)
            chosen = student_ids[first:end].numpy() if request.of_student else None
            part, rows = await self._score_chunk(tokens[: prompt_length + end], end - first, request, chosen, job)
            logprobs += part
            chunks.append(rows)
        return logprobs, top_scores.joined(chunks)

    async def _score_chunk(
        self, tokens: list[int], count: int, request: TopRequest, chosen_TK: np.ndarray | None, job: Job
    ) -> tuple[list[float], list[Rows]]:
        """Of the last ``count`` tokens: log-probs, then (ids, log-probs) of the teacher's and the student's choice."""
        extra: dict[str, Any] = top_request("input", request.count) if request.of_teacher else {}
        union_U = None if chosen_TK is None else np.unique(chosen_TK)
        if union_U is not None:
            extra["token_ids_logprob"] = union_U.tolist()

        def read(answer: Any) -> tuple[list[float], list[Rows]]:
            logprobs = response_logprobs(answer, tokens, count)
            rows = []
            try:
                if request.of_teacher:
                    rows.append(top_scores.teacher_rows(answer["meta_info"], request, positions=count))
                if chosen_TK is not None:
                    rows.append(top_scores.chosen_rows(answer["meta_info"], union_U, chosen_TK))
                for ids_TK, logprobs_TK in rows:
                    top_scores.check_rows(ids_TK, logprobs_TK, tokens[-count:], logprobs)
            except ValueError as error:
                raise TeacherScoreError("top", str(error)) from error
            return logprobs, rows

        return await self._read(_score_request(tokens, start=len(tokens) - count - 1, extra=extra), read, job)

    async def ask(
        self, tokens: list[int], *, start: int, temperature: float = 0.0, extra: dict[str, Any] | None = None
    ) -> Any:
        """The server's raw answer with input log-probs from position ``start`` on, and what ``extra`` asks for.

        Raises:
            TeacherScoreError: see ``score``.
        """
        payload = _score_request(tokens, start=start, temperature=temperature, extra=extra)
        return await self._asking(self.http.post("/generate", payload, kind=_kind(payload)))

    async def _read(self, payload: dict[str, Any], read: Callable[[Any], T], job: Job) -> T:
        """``read`` of the answer; of another address's when it cannot be used."""
        kind = _kind(payload)
        answer = await self._asking(self.http.ask("/generate", payload, kind=kind, job=job))
        try:
            return read(answer.value)
        except TeacherScoreError:
            if not self.http.others(answer.endpoint):
                raise
        second = await self._asking(self.http.ask("/generate", payload, kind=kind, job=job, avoid=answer.endpoint))
        result = read(second.value)
        self.http.blame(answer.endpoint)  # the sample is not at fault, as another address can score it
        return result

    async def _asking(self, request: Awaitable[T]) -> T:
        try:
            return await request
        except HttpError as error:
            raise TeacherScoreError(error.reason, str(error).removeprefix(f"{error.reason}: ")) from error


def _score_request(
    tokens: list[int], *, start: int, temperature: float = 0.0, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A start of prompt length - 1 lets the prefix cache serve the prompt: the entry at the boundary is null, hence the
    -1."""
    return {
        "input_ids": tokens,
        "sampling_params": {"temperature": temperature, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": start,
        **(extra or {}),
    }


def _kind(payload: dict[str, Any]) -> tuple[int, bool]:
    """Requests take about as long as each other when as many tokens, up to a factor of 2, are answered alike."""
    more = "token_ids_logprob" in payload or "top_logprobs_num" in payload
    return (len(payload["input_ids"]) - payload["logprob_start_len"]).bit_length(), more


def response_logprobs(answer: Any, tokens: list[int], response_length: int) -> list[float]:
    """The response tokens' log-probs in an answer of SGLang's ``/generate``, in nats.

    Raises:
        TeacherScoreError: too few entries, other token ids than were sent, or a value that is no log-prob.
    """
    if response_length == 0:
        return []
    try:
        entries = answer["meta_info"]["input_token_logprobs"]
        logprobs = [entry[0] for entry in entries]
        ids = [entry[1] for entry in entries]
    except (KeyError, TypeError, IndexError) as error:
        raise TeacherScoreError(
            "shape", f"the answer has no meta_info.input_token_logprobs of [log-prob, id] entries ({error!r})"
        ) from error
    first = len(entries) - response_length
    if first < 1 or len(entries) > len(tokens):  # entry ``first - 1`` is the token before the response
        raise TeacherScoreError(
            "length", f"{len(entries)} entries for a response of {response_length} tokens and the token before it"
        )
    wrong = [
        (i, got, sent) for i, (got, sent) in enumerate(zip(ids, tokens[-len(entries) :], strict=True)) if got != sent
    ]
    if wrong and not _is_last_vocabulary_id(wrong):
        entry, got, sent = wrong[0]
        raise TeacherScoreError("ids", f"the answer is about other tokens: entry {entry} has id {got}, {sent} was sent")
    for i, value in enumerate(logprobs[first:]):
        if not isinstance(value, int | float) or not math.isfinite(value) or value < LOWEST_LOGPROB:
            raise TeacherScoreError("not_finite", f"response token {i} has log-prob {value!r}")
        if value > HIGHEST_LOGPROB:
            raise TeacherScoreError(
                "positive",
                f"response token {i} has log-prob {value:.3g}, a probability above 1: use a stock SGLang server",
            )
    return [float(value) for value in logprobs[first:]]


def _is_last_vocabulary_id(wrong: list[tuple[int, int, int]]) -> bool:
    """SGLang echoes the last id of its vocabulary as 0 (seen on 0.5.23; it scores the right one), and only that id."""
    return {got for _, got, _ in wrong} == {0} and len({sent for _, _, sent in wrong}) == 1
