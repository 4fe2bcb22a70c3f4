"""An engine and a reward function that write down what they finish, and do nothing that is written down already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from opd.interfaces import RewardFn, RolloutEngine
from opd.rollout.journal import MISSING, RolloutJournal
from opd.types import GenerationRequest, GenerationResult, Sample, SamplingParams


class JournaledEngine:
    """``RolloutEngine`` around another one. Statistics of the engine do not count answers that were taken back."""

    def __init__(self, engine: RolloutEngine, journal: RolloutJournal) -> None:
        self._engine = engine
        self._journal = journal
        self._version = 0

    def __getattr__(self, name: str) -> Any:
        """What an engine offers beyond the protocol."""
        return getattr(self._engine, name)

    def generate(self, requests: list[GenerationRequest], params: SamplingParams) -> Iterator[GenerationResult]:
        """See ``RolloutEngine.generate``; answers of the journal come first."""
        missing: dict[int, GenerationRequest] = {}
        for request in requests:
            kept = self._journal.answer(request)
            if kept is None:
                missing[request.key] = request
            else:
                yield kept
        if missing:
            for result in self._engine.generate(list(missing.values()), params):
                self._journal.keep_answer(missing[result.key], result)
                yield result

    def set_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """See ``RolloutEngine.set_weights``."""
        self._engine.set_weights(named_tensors, version=version)
        self._version = version

    def verify(self, tokens: list[int], expected_logprobs: list[float], *, tolerance: float) -> float:
        """See ``RolloutEngine.verify``."""
        difference = self._engine.verify(tokens, expected_logprobs, tolerance=tolerance)
        self._journal.weights(self._version, expected_logprobs)
        return difference

    def close(self) -> None:
        self._engine.close()


class JournaledReward:
    """``RewardFn`` around another one, asked only about answers whose reward is not written down."""

    def __init__(self, reward: RewardFn, journal: RolloutJournal) -> None:
        self._reward = reward
        self._journal = journal

    def __getattr__(self, name: str) -> Any:
        """The function's name, and what ``ScoredAgain`` has beside ``score_again``."""
        return getattr(self._reward, name)

    async def __call__(self, args: Any, sample: Sample, **kwargs: Any) -> float | dict[str, Any]:
        kept = self._journal.reward(sample)
        if kept is not MISSING:
            return kept
        before = dict(sample.metadata)
        value = await self._reward(args, sample, **kwargs)
        added = {k: v for k, v in sample.metadata.items() if k not in before or before[k] is not v}
        self._journal.keep_reward(sample, value, metadata=added)
        return value

    async def score_again(self, args: Any, sample: Sample) -> float | dict[str, Any]:
        """See ``ScoredAgain``."""
        value = await self._reward.score_again(args, sample)
        self._journal.keep_reward(sample, value, metadata={})
        return value
