"""Single scoring requests, timed: what every check of a health report asks with."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from opd.teachers.sglang_teacher import SGLangTeacher, response_logprobs


@dataclass(frozen=True, kw_only=True)
class Timed:
    logprobs: list[float]  # of the response tokens, nats
    seconds: float
    cached_tokens: int | None  # of the prompt, from the server's prefix cache; None: it does not say


class Probe:
    """
    Args:
        client: sends each request as it is, in any number at once.
        known_ids: token ids that the teacher knows.
        seed: of the made-up prompts; another at each call, so that no earlier report's are in the server's cache.
    """

    def __init__(self, client: SGLangTeacher, known_ids: Sequence[int], *, seed: int | None = None) -> None:
        self.client = client
        self._known_ids = sorted(set(known_ids))
        self._random = random.Random(seed)

    def new_ids(self, count: int) -> list[int]:
        """Token ids that the server has not seen in this order."""
        return self._random.choices(self._known_ids, k=count)

    async def score(
        self, tokens: list[int], response_length: int, *, temperature: float = 0.0, from_start: bool = False
    ) -> Timed:
        """
        Args:
            from_start: ask for the prompt's log-probs too, which turns the server's prefix cache off.

        Raises:
            TeacherScoreError: no answer, or one about something else.
        """
        start = 0 if from_start else len(tokens) - response_length - 1
        started = time.monotonic()
        answer = await self.client.ask(tokens, start=start, temperature=temperature)
        seconds = time.monotonic() - started
        logprobs = response_logprobs(answer, tokens, response_length)
        return Timed(logprobs=logprobs, seconds=seconds, cached_tokens=answer["meta_info"].get("cached_tokens"))
