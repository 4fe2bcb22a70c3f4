"""Prompts -> answered, rewarded and (with an SGLang teacher) scored samples.

The engine decodes on this thread; as each answer finishes, its reward function starts on a background event loop, so
rewards and teacher scores overlap with the decoding of the rest, and only their tail is waited for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from opd.background_loop import BackgroundLoop
from opd.data.prompts import Prompt
from opd.errors import RewardError
from opd.interfaces import PostProcessFn, RewardFn, RolloutEngine
from opd.rollout.score_wait import ScoreWait
from opd.types import GenerationRequest, GenerationResult, Sample, SampleStatus, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RolloutResult:
    samples: list[Sample]  # in request order; ``reward`` is the raw reward, a float
    rewards: list[float]  # what the estimator uses, after post-processing
    seconds_generation: float
    seconds_scoring_tail: float  # waited for rewards and teacher after the last answer
    scoring: dict[str, float]  # by metric: of the teacher's client, of an engine in which a teacher helps to write


class RolloutDriver:
    """
    Args:
        reward: called once per finished sample; its dict or float is handed to ``post_process``.
        args: the flat flags, slime's first argument of ``reward`` and ``post_process``.
        decode: token ids -> text.
        take_scoring_stats: counters since the last call, for the metrics.
        score_wait: what to do when too many samples lack a score; nothing without it.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        *,
        reward: RewardFn,
        post_process: PostProcessFn,
        args: Any,
        decode: Callable[[list[int]], str],
        take_scoring_stats: Callable[[], dict[str, float]] = dict,
        score_wait: ScoreWait | None = None,
    ) -> None:
        self.engine = engine
        self._reward = reward
        self._post_process = post_process
        self._args = args
        self._decode = decode
        self._take_scoring_stats = take_scoring_stats
        self._score_wait = score_wait
        self._loop = BackgroundLoop("rewards")

    def run(
        self,
        prompts: list[Prompt],
        *,
        samples_per_prompt: int,
        first_index: int,
        params: SamplingParams,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> RolloutResult:
        """Writes and scores ``samples_per_prompt`` answers to each prompt; ``advance`` is told each one's tokens.

        Raises:
            RewardError: a reward function raised, or gave no number. An aborted answer is no error: its reward is 0 and
                training leaves it out.
        """
        started = time.monotonic()
        samples = self._new_samples(prompts, samples_per_prompt, first_index)
        requests = [
            GenerationRequest(
                key=sample.index,
                prompt_ids=tuple(sample.tokens),
                teacher_prompt_ids=prompts[sample.group_index].mixture_ids,
            )
            for sample in samples
        ]
        by_key = {s.index: s for s in samples}
        rewards: list[tuple[Sample, Future[Any]]] = []
        failed: list[GenerationResult] = []
        for result in self.engine.generate(requests, params):
            sample = by_key[result.key]
            self._fill_in(sample, result)
            advance(sample.response_length)
            if sample.status is SampleStatus.ABORTED:
                sample.reward = 0.0
                failed += [result] if result.error is not None else []
            else:
                rewards.append(self._start_reward(sample))
        if failed:
            message = "%d of %d answers could not be written and are left out; the first is number %d: %s"
            logger.warning(message, len(failed), len(samples), failed[0].key, failed[0].error)
        return self._finish(samples, rewards, started)

    def score(self, samples: list[Sample]) -> RolloutResult:
        """The same for answers that are already written: reward function and post-processing, no engine.

        Raises:
            RewardError: see ``run``.
        """
        return self._finish(samples, [self._start_reward(sample) for sample in samples], time.monotonic())

    def close(self) -> None:
        """Ends the event loop of the rewards; the engine is its maker's to close."""
        self._loop.close()

    def _start_reward(self, sample: Sample) -> tuple[Sample, Future[Any]]:
        return sample, self._loop.submit(self._reward(self._args, sample))

    def _finish(
        self, samples: list[Sample], rewards: list[tuple[Sample, Future[Any]]], started: float
    ) -> RolloutResult:
        """Waits for the ``rewards`` of samples that were all written since ``started``."""
        generated = time.monotonic()
        for sample, future in rewards:
            sample.reward = self._result_of(sample, future)
        if self._score_wait is not None:
            again = self._score_wait.scorer.score_again
            self._score_wait([sample for sample, _ in rewards], lambda s: self._loop.submit(again(self._args, s)))
        raw, used = self._post_process(self._args, samples)
        for sample, value in zip(samples, raw, strict=True):
            sample.reward = _as_number(value, sample)
        return RolloutResult(
            samples=samples,
            rewards=[_as_number(value, sample) for sample, value in zip(samples, used, strict=True)],
            seconds_generation=generated - started,
            seconds_scoring_tail=time.monotonic() - generated,
            scoring=self._take_scoring_stats(),
        )

    def _new_samples(self, prompts: list[Prompt], samples_per_prompt: int, first_index: int) -> list[Sample]:
        return [
            Sample(
                index=first_index + g * samples_per_prompt + i,
                group_index=g,
                prompt=prompt.text,
                tokens=list(prompt.ids),
                label=prompt.label,
                metadata=dict(prompt.metadata),
                teacher_index=prompt.teacher_index,
                teacher_prompt_ids=None if prompt.teacher_ids is None else list(prompt.teacher_ids),
            )
            for g, prompt in enumerate(prompts)
            for i in range(samples_per_prompt)
        ]

    def _fill_in(self, sample: Sample, result: GenerationResult) -> None:
        sample.tokens += result.response_ids
        sample.response_length = len(result.response_ids)
        sample.response = self._decode(result.response_ids)
        sample.rollout_log_probs = result.log_probs
        sample.status = result.status
        sample.weight_version = result.weight_version
        sample.weight_spans = result.weight_spans
        sample.student_top_ids = result.top_ids

    def _result_of(self, sample: Sample, future: Future[Any]) -> Any:
        try:
            return future.result()
        except Exception as error:  # whatever a user's function raises: name the function and the sample
            name = getattr(self._reward, "__qualname__", repr(self._reward))
            raise RewardError(
                f"reward function {name} failed on sample {sample.index}: {type(error).__name__}: {error}"
            ) from error


def keep_rewards(args: Any, samples: list[Sample], **_: Any) -> tuple[list[float], list[float]]:
    """The post-processing of a run that names none: rewards are used as they came."""
    rewards = [_as_number(sample.reward, sample) for sample in samples]
    return rewards, rewards


def _as_number(value: Any, sample: Sample) -> float:
    if isinstance(value, bool | int | float):
        return float(value)
    raise RewardError(f"the reward of sample {sample.index} is {value!r}: a number is needed")
