"""The seams of the framework. ``opd.step`` knows these Protocols and no implementation; ``opd.build`` chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch

from opd.errors import TeacherError, WeightSyncError  # noqa: F401  (raised across these seams)
from opd.types import GenerationRequest, GenerationResult, Sample, SamplingParams, TokenBatch


class RolloutEngine(Protocol):
    """Writes answers with the student's current weights."""

    def generate(self, requests: list[GenerationRequest], params: SamplingParams) -> Iterator[GenerationResult]:
        """Yields one result per request, each as soon as it is finished, in any order.

        One that ``params.pause_after`` cuts short is PENDING; a request with what is written goes on from there.
        """

    def set_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Loads weights under Hugging Face names and makes later results carry ``version``.

        Raises:
            WeightSyncError: the engine did not take the weights, or not these weights.
        """

    def verify(self, tokens: list[int], expected_logprobs: list[float], *, tolerance: float) -> float:
        """Scores ``tokens[1:]`` given what precedes each, at temperature 1.

        Returns:
            the mean absolute difference to ``expected_logprobs``, in nats.

        Raises:
            WeightSyncError: it is above ``tolerance``: the engine does not hold the trainer's weights.
        """

    def close(self) -> None:
        """Stops whatever the engine started. Safe to call twice."""


@runtime_checkable
class EngineWithStats(Protocol):
    """A ``RolloutEngine`` with numbers about what it wrote."""

    stats_prefix: str  # of the metrics that ``take_stats`` gives

    def take_stats(self) -> dict[str, float]:
        """Numbers since the last call; none when there are none."""


class RewardFn(Protocol):
    """slime's signature. ``args`` is the flat namespace of all flags."""

    async def __call__(self, args: Any, sample: Sample, **kwargs: Any) -> float | dict[str, Any]: ...


class ScoredAgain(Protocol):
    """A ``RewardFn`` that asks somebody who may be away, and can ask again. It reads what it returned before in
    ``sample.reward``."""

    def unscored(self, sample: Sample) -> bool:
        """Whether a part of the reward is missing."""

    def may_be_scored(self, sample: Sample) -> bool:
        """Whether asking again may help."""

    async def score_again(self, args: Any, sample: Sample) -> float | dict[str, Any]:
        """The reward with the missing part, or again without it; the rest of it is not computed anew."""


class PostProcessFn(Protocol):
    """slime's signature: (raw rewards, rewards used by the estimator), one float per sample each."""

    def __call__(self, args: Any, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]: ...


class Critic(Protocol):
    """PPO's value model. With several ranks every method is called by all of them together."""

    def forward_values(self, batch: TokenBatch) -> TokenBatch:
        """Fills ``values_T``. No gradients."""

    def start_update(self, batch: TokenBatch) -> Callable[[], dict[str, float]]:
        """Optimizer steps as ``Trainer.update``'s, towards ``returns_T``. What is returned waits for their end and
        gives their metrics; the student may learn in between, where the critic has ranks of its own.

        Raises:
            UpdateError: NaN or infinite gradients; from here or from what is returned.
        """

    def save(self, iteration: int) -> None: ...

    def close(self) -> None: ...


class Trainer(Protocol):
    """Holds the student (and co-loaded teachers), computes log-probs and updates the student.

    With several ranks every method is called by all of them together.
    """

    def load(self, batch: TokenBatch | None) -> TokenBatch:
        """This data-parallel rank's share of the batch that rank 0 gives."""

    def forward_logprobs(self, batch: TokenBatch, model: str) -> TokenBatch:
        """``model``: "student" fills ``student_logprobs_T``, ``student_kl_logprobs_T``, ``student_entropy_T`` and
        ``student_likely``; "teacher" fills ``teacher_logprobs_T``, ``teacher_entropy_T``, ``teacher_scored_N`` and
        ``teacher_likely``; "reference" fills ``ref_logprobs_T``. No gradients."""

    def map(self, fn: Callable[..., TokenBatch], batch: TokenBatch) -> TokenBatch:
        """``fn(batch, data_parallel_group=...)`` on this rank's share; the group is None for one rank."""

    def update(self, batch: TokenBatch) -> dict[str, float]:
        """One or more optimizer steps over the batch; returns metrics averaged over the global batch.

        Raises:
            UpdateError: NaN or infinite gradients; the weights are as before.
        """

    def from_all_shares(self, values: dict[int, Any]) -> dict[int, Any]:
        """On the first rank the entries of all data-parallel shares; elsewhere what the caller has to ignore. Keys are
        those of one share only."""

    def sum_over_ranks(self, sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
        """Both dicts merged, summed and maximised over the data-parallel ranks."""

    def on_any_rank(self, yes: bool) -> bool:
        """Whether any rank, of all kinds, says ``yes``."""

    def from_first_rank(self, value: Any) -> Any:
        """What the first rank passed, on every rank, however long that takes to come."""

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The student's weights under Hugging Face names, whole tensors on every rank."""

    def score(self, batch: TokenBatch) -> torch.Tensor:
        """Temperature-1 log-probs [T] of the student, whole on every rank."""

    def save(self, iteration: int, *, extra: dict[str, Any]) -> None:
        """Writes a checkpoint; with --async-save takes a copy that is written in the background.

        Raises:
            CheckpointError: it could not be written; the checkpoints before stay valid.
        """

    def finished_save(self, *, wait: bool) -> int | None:
        """The iteration of a save that is complete since the last call; None: there is none, or it is still being
        written. The same on all ranks.

        Raises:
            CheckpointError: it failed. It is forgotten then.
        """

    def close(self) -> None: ...
