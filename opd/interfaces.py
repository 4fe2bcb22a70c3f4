"""The seams of the framework. ``opd.step`` knows these Protocols and no implementation; ``opd.build`` chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from opd.types import GenerationRequest, GenerationResult, Sample, SamplingParams, TokenBatch


class RolloutEngine(Protocol):
    """Writes answers with the student's current weights."""

    def generate(self, requests: list[GenerationRequest], params: SamplingParams) -> Iterator[GenerationResult]:
        """Yields one result per request, each as soon as it is finished, in any order."""

    def set_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Loads weights under Hugging Face names and makes later results carry ``version``.

        Raises:
            WeightSyncError: the engine did not take the weights, or not these weights.
        """

    def close(self) -> None:
        """Stops whatever the engine started. Safe to call twice."""


class RewardFn(Protocol):
    """slime's signature. ``args`` is the flat namespace of all flags."""

    async def __call__(self, args: Any, sample: Sample, **kwargs: Any) -> float | dict[str, Any]: ...


class PostProcessFn(Protocol):
    """slime's signature: (raw rewards, rewards used by the estimator), one float per sample each."""

    def __call__(self, args: Any, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]: ...


class Trainer(Protocol):
    """Holds the student (and a co-loaded teacher), computes log-probs and updates the student."""

    def load(self, batch: TokenBatch) -> TokenBatch:
        """This data-parallel rank's share of the batch."""

    def forward_logprobs(self, batch: TokenBatch, model: str) -> TokenBatch:
        """``model``: "student" fills ``student_logprobs_T`` and ``student_kl_logprobs_T``; "teacher" fills
        ``teacher_logprobs_T``. No gradients."""

    def map(self, fn: Callable[[TokenBatch], TokenBatch], batch: TokenBatch) -> TokenBatch: ...

    def update(self, batch: TokenBatch) -> dict[str, float]:
        """One or more optimizer steps over the batch; returns metrics averaged over the global batch."""

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The student's weights under Hugging Face names, whole tensors on every rank."""

    def save(self, iteration: int) -> None: ...


class WeightSyncError(RuntimeError):
    """An engine's weights are not the trainer's."""


class TeacherError(RuntimeError):
    """A teacher that cannot be used: unreachable, other tokenizer, other temperature contract."""
