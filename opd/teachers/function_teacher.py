"""A teacher that is a function of the user's: ``(args, sample) -> log-probs of the response tokens``.

It runs on an event loop of its own, from its first call to the end of the run: connections and models that it keeps in
its module stay valid. An async function scores all samples that wait at once; a plain one holds the loop, so it scores
one at a time. Either way answers are written meanwhile.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Callable
from numbers import Real
from typing import Any

from opd.background_loop import BackgroundLoop
from opd.data.prompts import Prompt
from opd.errors import ResultError, TeacherAwayError, TeacherError
from opd.rollout.partial import new_sample
from opd.serving.http_stats import HttpStats
from opd.teachers.score_keys import TeacherScore
from opd.types import Sample, SampleStatus
from opd.user_functions import failure

logger = logging.getLogger(__name__)

ROUNDING = 1e-3  # nats above 0 that a log-softmax in a narrow type may reach; the KL does not see them
TOLD = 20  # ways of failing that are logged with their first sample
TRIAL_TOKENS = 8  # of the answer that is scored at start


class FunctionTeacher:
    """
    Args:
        function: plain or async.
        args: its first argument, all flags by name.
        shown: the flag and value that name it, for messages.
    """

    def __init__(self, function: Callable[[Any, Any], Any], *, args: Any, shown: str) -> None:
        self._function = function
        self._args = args
        self._shown = shown
        self._loop = BackgroundLoop("custom teacher")
        self._stats = HttpStats()
        self._told: set[str] = set()  # failures that were logged with their sample

    async def score(self, sample: Any, client_of: object = None) -> TeacherScore:
        """See ``ScoringTeacher``; clients of servers are not asked for.

        Raises:
            TeacherAwayError: the function raised something.
            TeacherError: what it returned is no row of log-probs.
        """
        try:
            return await self._score(sample)
        except TeacherError as error:
            self._tell(sample, str(error))
            raise

    def check(self, prompt: Prompt) -> None:
        """Scores a short answer to ``prompt``, made of its own last tokens.

        Raises:
            TeacherError: it got no score.
        """
        sample = trial_sample(prompt)
        try:
            asyncio.run(self._score(sample))
        except TeacherError as error:
            raise TeacherError(
                f"{error}. It was tried on the first prompt, answered with {sample.response_length} tokens. Mend the "
                "function, or leave the trial out with --opd-skip-teacher-selftest"
            ) from error
        self._stats.take()  # it may have loaded a model

    def take_stats(self) -> dict[str, float]:
        """Since the last call: calls, those without a score, and how long the others took."""
        numbers = self._stats.take().numbers()
        return {
            name: value
            for name, value in numbers.items()
            if name in ("requests", "failures", "seconds") or name.startswith("latency_")
        }

    def close(self) -> None:
        self._loop.close()

    async def _score(self, sample: Any) -> TeacherScore:
        if sample.response_length == 0:
            return TeacherScore(logprobs=[])
        started = time.monotonic()
        self._stats.requests += 1
        try:
            value = await asyncio.wrap_future(self._loop.submit(self._call(sample)))
            logprobs = checked_logprobs(value, sample.response_length)
        except Exception as error:  # whatever a user's function raises
            self._stats.failures += 1
            kind = TeacherError if isinstance(error, ResultError) else TeacherAwayError
            raise kind(f"{self._shown} {failure(error)}") from error
        seconds = time.monotonic() - started
        self._stats.seconds += seconds
        self._stats.latencies.append(seconds)
        return TeacherScore(logprobs=logprobs)

    async def _call(self, sample: Any) -> Any:
        value = self._function(self._args, sample)
        return await value if inspect.isawaitable(value) else value

    def _tell(self, sample: Any, text: str) -> None:
        """The first sample that fails in each way."""
        if text not in self._told and len(self._told) < TOLD:
            self._told.add(text)
            logger.warning("sample %d: %s", sample.index, text)


def checked_logprobs(value: Any, response_length: int) -> list[float]:
    """
    Raises:
        ResultError: not one number per response token, or a number that is no log-prob.
    """
    values = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(values, list | tuple):
        raise ResultError(f"returned {type(value).__name__}: a list, array or tensor of log-probs is needed")
    if len(values) != response_length:
        raise ResultError(
            f"returned {len(values)} log-probs for a response of {response_length} tokens: one per response token is "
            "needed, none for the prompt"
        )
    for place, number in enumerate(values):
        if isinstance(number, bool) or not isinstance(number, Real):
            raise ResultError(f"returned {number!r} for response token {place}: a number is needed")
        if not math.isfinite(number) or number > ROUNDING:
            raise ResultError(
                f"returned {number!r} for response token {place}: a log-prob is finite and at most 0. A token that the "
                "teacher never writes needs a floor, such as -30"
            )
    return [min(0.0, float(number)) for number in values]


def trial_sample(prompt: Prompt) -> Sample:
    """``prompt``, answered with its own last tokens."""
    sample = new_sample(prompt, index=0)
    answer = list(prompt.ids[-TRIAL_TOKENS:])
    sample.tokens, sample.response_length = [*prompt.ids, *answer], len(answer)
    sample.response, sample.status = prompt.text, SampleStatus.COMPLETED
    return sample
