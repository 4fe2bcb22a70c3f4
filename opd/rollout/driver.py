"""Prompts -> answered, rewarded and (with an SGLang teacher) scored samples.

The engine decodes on this thread; as each answer finishes, its reward function starts on a background event loop, so
rewards and teacher scores overlap with the decoding of the rest, and only their tail is waited for.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from opd.background_loop import BackgroundLoop
from opd.data.prompts import Prompt
from opd.errors import RewardError
from opd.interfaces import PostProcessFn, RewardFn, RolloutEngine
from opd.rollout.partial import AnswerGroup, continue_with, new_group, number_groups, request_for
from opd.rollout.score_wait import ScoreWait
from opd.types import GenerationResult, Sample, SampleStatus, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RolloutResult:
    samples: list[Sample]  # in request order; ``reward`` is the raw reward, a float
    rewards: list[float]  # what the estimator uses, after post-processing
    seconds_generation: float
    seconds_scoring_tail: float  # waited for rewards and teacher after the last answer
    scoring: dict[str, float]  # by metric: of the teacher's client, of an engine in which a teacher helps to write
    rounds: int = 1  # see RolloutDriver.write
    in_flight: list[dict[str, Any]] = field(default_factory=list)  # what the next rollout goes on with, as JSON


class RolloutDriver:
    """
    Args:
        reward: called once per finished sample; its dict or float is handed to ``post_process``.
        args: the flat flags, slime's first argument of ``reward`` and ``post_process``.
        decode: token ids -> text.
        take_scoring_stats: counters since the last call, for the metrics.
        score_wait: what to do when too many samples lack a score; nothing without it.
        loop: another driver's, on which the rewards then run, with that one's connections to servers.
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
        loop: BackgroundLoop | None = None,
    ) -> None:
        self.engine = engine
        self._reward = reward
        self._post_process = post_process
        self._args = args
        self._decode = decode
        self._take_scoring_stats = take_scoring_stats
        self._score_wait = score_wait
        self._own_loop = loop is None
        self.loop = BackgroundLoop("rewards") if loop is None else loop

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
            RewardError: a reward function raised, or gave no finite number. An aborted answer is no error: its reward
                is 0 and training leaves it out.
        """
        groups = [
            new_group(prompt, first_index=first_index + g * samples_per_prompt, count=samples_per_prompt)
            for g, prompt in enumerate(prompts)
        ]
        return self.write(groups, leaving=len(groups), params=params, advance=advance)[0]

    def write(
        self,
        groups: list[AnswerGroup],
        *,
        leaving: int,
        params: SamplingParams,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> tuple[RolloutResult, list[AnswerGroup]]:
        """Writes on, in rounds, until ``leaving`` groups have all their answers, and scores what is finished.

        A round gives every unfinished answer up to ``params.pause_after`` tokens; without that the first one finishes
        all of them. ``advance`` is told the tokens of each answer in each round.

        Returns:
            the first ``leaving`` complete groups as a rollout, and the other groups in their order.

        Raises:
            RewardError: see ``run``.
        """
        started, rounds = time.monotonic(), 0
        number_groups(groups)
        rewards = self._ask_again(groups)
        while rounds == 0 or sum(group.complete for group in groups) < leaving:
            rewards += self._write_round(groups, params, advance)
            rounds += 1
        done = [group for group in groups if group.complete][:leaving]
        others = [group for group in groups if group not in done]
        number_groups(done)
        result = self._finish([s for group in done for s in group.samples], rewards, started)
        return replace(result, rounds=rounds), others

    def score(self, samples: list[Sample]) -> RolloutResult:
        """The same for answers that are already written: reward function and post-processing, no engine.

        Raises:
            RewardError: see ``run``.
        """
        return self._finish(samples, [self._start_reward(sample) for sample in samples], time.monotonic())

    def close(self) -> None:
        """Ends the event loop of the rewards, if it is this driver's own; the engine is its maker's to close."""
        if self._own_loop:
            self.loop.close()

    def _write_round(
        self, groups: list[AnswerGroup], params: SamplingParams, advance: Callable[[int], None]
    ) -> list[tuple[Sample, Future[Any]]]:
        """The rewards of the answers that were finished."""
        unfinished = {sample.index: (group, sample) for group in groups for sample in group.unfinished}
        requests = [request_for(group.prompt, sample) for group, sample in unfinished.values()]
        rewards: list[tuple[Sample, Future[Any]]] = []
        failed: list[GenerationResult] = []
        for result in self.engine.generate(requests, params) if requests else ():
            _, sample = unfinished[result.key]
            continue_with(sample, result)
            advance(len(result.response_ids))
            if sample.status is SampleStatus.PENDING:
                continue
            sample.response = self._decode(sample.response_ids)
            if sample.status is SampleStatus.ABORTED:
                sample.reward = 0.0
                failed += [result] if result.error is not None else []
            else:
                rewards.append(self._start_reward(sample))
        if failed:
            message = "%d of %d answers could not be written and are left out; the first is number %d: %s"
            logger.warning(message, len(failed), len(requests), failed[0].key, failed[0].error)
        return rewards

    def _ask_again(self, groups: list[AnswerGroup]) -> list[tuple[Sample, Future[Any]]]:
        """For answers finished in an earlier rollout: a reward that a checkpoint could not keep, a score that a teacher
        who was away did not give."""
        finished = [s for group in groups for s in group.samples if s.status is not SampleStatus.PENDING]
        rewards = [self._start_reward(sample) for sample in finished if sample.reward is None]
        if self._score_wait is not None:
            scorer = self._score_wait.scorer
            missing = [sample for sample in finished if sample.reward is not None and scorer.may_be_scored(sample)]
            rewards += [(s, self.loop.submit(scorer.score_again(self._args, s))) for s in missing]
        return rewards

    def _start_reward(self, sample: Sample) -> tuple[Sample, Future[Any]]:
        return sample, self.loop.submit(self._reward(self._args, sample))

    def _finish(
        self, samples: list[Sample], rewards: list[tuple[Sample, Future[Any]]], started: float
    ) -> RolloutResult:
        """Waits for ``rewards``, of ``samples`` or of others, and post-processes those of ``samples``."""
        generated = time.monotonic()
        for sample, future in rewards:
            sample.reward = self._result_of(sample, future)
        if self._score_wait is not None:
            again = self._score_wait.scorer.score_again
            scored = [sample for sample in samples if sample.status is not SampleStatus.ABORTED]
            self._score_wait(scored, lambda s: self.loop.submit(again(self._args, s)))
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
    """NaN is refused too: it would pass into the advantages of its whole group, and end in the gradients."""
    if isinstance(value, Real) and math.isfinite(value):  # numpy's numbers are Real
        return float(value)
    raise RewardError(f"the reward of sample {sample.index} is {value!r}: a finite number is needed")
