"""Which served teacher (or teachers) score a sample, and what becomes of their answers."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from opd.config.schema import Config
from opd.config.teachers import ONLY, TeacherSpec, teachers
from opd.errors import TeacherError
from opd.serving.http import HttpError
from opd.teachers.cross_tokenizer import CrossTokenizer
from opd.teachers.score_cache import ScoreCache
from opd.teachers.score_keys import ScoreRequest, TeacherScore
from opd.teachers.score_store import ScoreStore
from opd.teachers.sglang_teacher import SGLangTeacher, TeacherScoreError
from opd.teachers.top_scores import TopRequest
from opd.types import TopLogprobs

logger = logging.getLogger(__name__)

ClientOf = Callable[[str], SGLangTeacher]  # address -> client


class ScoringTeacher(Protocol):
    """Who scores answers one by one, as they are finished."""

    async def score(self, sample: Any, client_of: ClientOf) -> TeacherScore:
        """Of a ``Sample``.

        Raises:
            TeacherError: it got no score.
        """


@dataclass(frozen=True, kw_only=True)
class ServedTeachers:
    """
    Args:
        specs: in the order that ``Sample.teacher_index`` counts.
        mixes: every sample is scored by all of them, as the mixture of their distributions; otherwise by its own.
        top: also ask for likely tokens at each position.
        likely: at each position of a saved sample the teacher's likeliest tokens are wanted, for a reader.
        cache: scores that are stored are not asked for again.
        text: the teachers have another tokenizer and read the answer's text.
    """

    specs: tuple[TeacherSpec, ...]
    mixes: bool = False
    top: TopRequest | None = None
    cache: ScoreCache | None = None
    text: CrossTokenizer | None = None
    likely: TopRequest | None = None

    @classmethod
    def of_config(cls, config: Config, *, vocab_size: int, text: CrossTokenizer | None = None) -> ServedTeachers:
        """``vocab_size``: the student's."""
        flags = config.distillation
        top = None
        if flags.distillation_type is not None and flags.distillation_top_k is not None:
            top = TopRequest(count=flags.distillation_top_k, support=flags.distillation_support, vocab_size=vocab_size)
        return cls(
            specs=tuple(teachers(config)),
            mixes=config.opd.opd_teacher_combine == "probs",
            top=top,
            cache=_cache_of(config),
            text=text,
            likely=TopRequest(count=count, vocab_size=vocab_size) if (count := config.saved_alternatives) else None,
        )

    @classmethod
    def at(cls, url: str) -> ServedTeachers:
        """One teacher, for the sampled tokens only."""
        return cls(specs=(TeacherSpec(name=ONLY, location=url),))

    async def score(self, sample: Any, client_of: ClientOf) -> TeacherScore:
        """Of a ``Sample``, this framework's or slime's.

        Raises:
            TeacherError: a teacher could not score it; with several the message starts with its name.
        """
        if not self.mixes:
            return await self._ask(self.specs[getattr(sample, "teacher_index", 0)], sample, client_of)
        heard = [spec for spec in self.specs if spec.weight > 0]
        scores = await asyncio.gather(*(self._ask(spec, sample, client_of) for spec in heard))
        return TeacherScore(logprobs=mixture([s.logprobs for s in scores], [spec.weight for spec in heard]))

    async def _ask(self, spec: TeacherSpec, sample: Any, client_of: ClientOf) -> TeacherScore:
        if self.text is not None:
            reading = self.text.read(list(sample.tokens[len(sample.tokens) - sample.response_length :]))
            tokens = [*sample.teacher_prompt_ids, *reading.teacher_ids]
            request = ScoreRequest(tokens=tokens, response_length=len(reading.teacher_ids))
            score = await self._answer(spec, request, client_of)
            return TeacherScore(logprobs=reading.per_token(score.logprobs), spans=reading.student_spans)
        tokens, length = tokens_for_teacher(sample), sample.response_length
        request = ScoreRequest(tokens=tokens, response_length=length, top=self.top if length else None)
        if request.top is not None:
            request = replace(request, student_ids=getattr(sample, "student_top_ids", None))
        shown = self.likely if length and not self.mixes and getattr(sample, "saved", False) else None
        score = await self._answer(spec, request, client_of, shown)
        return score if shown is None else with_likely(score, request, shown)

    async def _answer(
        self, spec: TeacherSpec, request: ScoreRequest, client_of: ClientOf, shown: TopRequest | None = None
    ) -> TeacherScore:
        try:
            client = client_of(str(spec.location))
            if self.cache is None or request.response_length == 0:
                return await ask(client, request, shown)
            return await self.cache.score(str(spec.location), client, request, lambda: ask(client, request, shown))
        except TeacherError as error:
            if len(self.specs) == 1:
                raise
            raise TeacherError(f"teacher `{spec.name}`: {error}") from error


async def ask(client: SGLangTeacher, request: ScoreRequest, shown: TopRequest | None = None) -> TeacherScore:
    """
    Args:
        shown: likely tokens that may come with the score of a request without any. A teacher that cannot give them is
            asked for the score alone.

    Raises:
        TeacherError: no score.
    """
    if request.top is None and shown is not None:
        try:
            logprobs, likely = await client.score_top(request.tokens, request.response_length, shown)
            return TeacherScore(logprobs=logprobs, likely=likely)
        except TeacherScoreError as error:
            if not _refused(error):
                raise
            logger.debug("no likely tokens for a reader: %s", error)
    if request.top is None:
        return TeacherScore(logprobs=await client.score(request.tokens, request.response_length))
    logprobs, top = await client.score_top(request.tokens, request.response_length, request.top, request.student_ids)
    return TeacherScore(logprobs=logprobs, top=top)


def _refused(error: TeacherScoreError) -> bool:
    """Whether a score failed for what was asked, not for who was asked."""
    cause = error.__cause__
    return error.reason == "top" or (isinstance(cause, HttpError) and cause.status == 400)


def with_likely(score: TeacherScore, request: ScoreRequest, shown: TopRequest) -> TeacherScore:
    """``score`` with up to ``shown.count`` of the teacher's likeliest tokens at each position, where they are known: a
    loss that asks about the teacher's choice has them in front, one that asks about the student's alone has none."""
    likely = score.likely
    if request.top is not None:
        likely = score.top if request.top.of_teacher else None
    if likely is None:
        return score
    count = shown.count if request.top is None else min(shown.count, request.top.count)
    ids_TK, logprobs_TK = likely.ids_TK[:, :count], likely.logprobs_TK[:, :count]
    if int(ids_TK.max()) >= shown.vocab_size:  # stored for another student
        return replace(score, likely=None)
    return replace(score, likely=TopLogprobs(ids_TK=ids_TK, logprobs_TK=logprobs_TK))


def _cache_of(config: Config) -> ScoreCache | None:
    flags = config.opd
    if flags.opd_teacher_cache is None:
        return None
    store = ScoreStore(flags.opd_teacher_cache, max_bytes=int(flags.opd_teacher_cache_gb * 1e9))
    return ScoreCache(store, name=flags.opd_teacher_cache_name)


def tokens_for_teacher(sample: Any) -> list[int]:
    """The teacher's own prompt where it has one, and the same response."""
    prompt_ids = getattr(sample, "teacher_prompt_ids", None)
    if prompt_ids is None:
        return list(sample.tokens)
    return [*prompt_ids, *sample.tokens[len(sample.tokens) - sample.response_length :]]


def mixture(logprobs: list[list[float]], weights: list[float]) -> list[float]:
    """``log sum_k w_k p_k`` of each token: exact, as the mixture's probability of a token needs that token alone."""
    logs_KT = np.array(logprobs) + np.array([[math.log(weight)] for weight in weights])
    return np.logaddexp.reduce(logs_KT, axis=0).tolist()
