"""Which served teacher (or teachers) score a sample, and what becomes of their answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opd.config.schema import Config
from opd.config.teachers import ONLY, TeacherSpec, teachers
from opd.errors import TeacherError
from opd.teachers.cross_tokenizer import CrossTokenizer
from opd.teachers.score_cache import ScoreCache
from opd.teachers.score_keys import ScoreRequest, TeacherScore
from opd.teachers.score_store import ScoreStore
from opd.teachers.sglang_teacher import SGLangTeacher
from opd.teachers.top_scores import TopRequest

ClientOf = Callable[[str], SGLangTeacher]  # address -> client


@dataclass(frozen=True, kw_only=True)
class ServedTeachers:
    """
    Args:
        specs: in the order that ``Sample.teacher_index`` counts.
        mixes: every sample is scored by all of them, as the mixture of their distributions; otherwise by its own.
        top: also ask for likely tokens at each position.
        cache: scores that are stored are not asked for again.
        text: the teachers have another tokenizer and read the answer's text.
    """

    specs: tuple[TeacherSpec, ...]
    mixes: bool = False
    top: TopRequest | None = None
    cache: ScoreCache | None = None
    text: CrossTokenizer | None = None

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
        return await self._answer(spec, request, client_of)

    async def _answer(self, spec: TeacherSpec, request: ScoreRequest, client_of: ClientOf) -> TeacherScore:
        try:
            client = client_of(str(spec.location))
            if self.cache is None or request.response_length == 0:
                return await ask(client, request)
            return await self.cache.score(str(spec.location), client, request, lambda: ask(client, request))
        except TeacherError as error:
            if len(self.specs) == 1:
                raise
            raise TeacherError(f"teacher `{spec.name}`: {error}") from error


async def ask(client: SGLangTeacher, request: ScoreRequest) -> TeacherScore:
    """
    Raises:
        TeacherError: no score.
    """
    if request.top is None:
        return TeacherScore(logprobs=await client.score(request.tokens, request.response_length))
    logprobs, top = await client.score_top(request.tokens, request.response_length, request.top, request.student_ids)
    return TeacherScore(logprobs=logprobs, top=top)


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
