"""HTTP client of a teacher served by SGLang: log-probs of a sample's response tokens."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from typing import Any

from opd.errors import TeacherError
from opd.serving.http import HttpError, HttpStats, JsonClient, base_url

# Prompts whose first score is in flight or done. It only bounds memory: forgetting one costs one prefill.
REMEMBERED_PROMPTS = 4096

TROUBLE_SECONDS = 30.0

TeacherStats = HttpStats


class TeacherScoreError(TeacherError):
    """One sample that got no score.

    Attributes:
        reason: "unreachable", "timeout", "http_status", "bad_json", "shape", "length", "ids", "not_finite" or "prompt".
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class SGLangTeacher:
    """
    Args:
        url: the server's address, with or without ``/generate``.
        timeout_s: for one attempt.
        retries: further attempts on connection errors, time-outs, 5xx answers and truncated JSON.
        concurrency: requests in flight.
        lead_prompts: let the first score of each distinct prompt finish before its siblings are sent, so that they
            find the prompt in the server's prefix cache.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        retries: int = 3,
        concurrency: int = 64,
        api_key: str | None = None,
        lead_prompts: bool = True,
    ) -> None:
        self.http = JsonClient(base_url(url), timeout_s, retries, concurrency, api_key)
        self._lead_prompts = lead_prompts
        self._trouble_until = 0.0
        self._led: OrderedDict[int, asyncio.Event] = OrderedDict()  # hash of a prompt's ids -> its first score is done

    @property
    def stats(self) -> TeacherStats:
        return self.http.stats

    async def score(self, tokens: list[int], response_length: int) -> list[float]:
        """Log-probs of the last ``response_length`` tokens at temperature 1, in nats.

        Raises:
            TeacherScoreError: the server could not be asked, or its answer does not fit the tokens.
        """
        if response_length == 0:
            return []
        prompt_length = len(tokens) - response_length
        if response_length < 0 or prompt_length < 1:
            raise TeacherScoreError(
                "prompt", f"{len(tokens)} tokens, {response_length} of them response, leave no prompt before it"
            )
        if not self._lead_prompts:
            return await self._score(tokens, response_length)

        prompt = hash(tuple(tokens[:prompt_length]))
        led = self._led.get(prompt)
        if led is not None:
            await led.wait()
            return await self._score(tokens, response_length)
        led = self._led[prompt] = asyncio.Event()
        if len(self._led) > REMEMBERED_PROMPTS:
            self._led.popitem(last=False)
        try:
            return await self._score(tokens, response_length)
        finally:
            led.set()

    async def close(self) -> None:
        await self.http.close()

    def _in_trouble(self) -> bool:
        """Whether a request was just given up on: its siblings then try once, so that a hung server costs a time-out or
        two and not one for each sample and retry."""
        return time.monotonic() < self._trouble_until

    async def _score(self, tokens: list[int], response_length: int) -> list[float]:
        answer = await self.ask(tokens, start=len(tokens) - response_length - 1)
        return response_logprobs(answer, tokens, response_length)

    async def ask(self, tokens: list[int], *, start: int, temperature: float = 0.0) -> Any:
        """The server's raw answer with input log-probs from position ``start`` on.

        A start of prompt length - 1 lets the prefix cache serve the prompt: the entry at the boundary is null, hence
        the -1.

        Raises:
            TeacherScoreError: see ``score``.
        """
        payload = {
            "input_ids": tokens,
            "sampling_params": {"temperature": temperature, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": start,
        }
        try:
            answer = await self.http.post("/generate", payload, give_up=self._in_trouble)
            self._trouble_until = 0.0
            return answer
        except HttpError as error:
            if error.reason in ("timeout", "unreachable"):
                self._trouble_until = time.monotonic() + TROUBLE_SECONDS
            detail = str(error).removeprefix(f"{error.reason}: ")
            raise TeacherScoreError(error.reason, detail) from error


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
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise TeacherScoreError("not_finite", f"response token {i} has log-prob {value!r}")
    return [float(value) for value in logprobs[first:]]


def _is_last_vocabulary_id(wrong: list[tuple[int, int, int]]) -> bool:
    """SGLang echoes the last id of its vocabulary as 0 (seen on 0.5.23; it scores the right one), and only that id."""
    return {got for _, got, _ in wrong} == {0} and len({sent for _, _, sent in wrong}) == 1
