"""Answers from the mixture of a student and a teacher held in this process, and from either alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from opd.types import GenerationRequest, GenerationResult, Mixture, SamplingParams

ENGINES = ("speculative", "lockstep", "teacher", "student")


@dataclass(kw_only=True)
class MixtureStats:
    """Counters over all calls that were given this object."""

    rounds: int = 0  # forward passes of the teacher, without prompts
    row_rounds: int = 0  # the same, summed over the answers that took part
    tokens: int = 0  # response tokens
    drafted: int = 0  # of the student's proposals, those that were judged: all up to the first rejection
    accepted: int = 0
    seconds: float = 0.0  # of decoding, prompts included


def write_mixture(
    student: nn.Module,
    teacher: nn.Module,
    requests: list[GenerationRequest],
    params: SamplingParams,
    mixture: Mixture,
    *,
    engine: str = "speculative",
    draft_tokens: int | None = None,
    vocab_size: int | None = None,
    max_running_requests: int,
    max_context_len: int,
    teacher_max_context_len: int | None = None,
    weight_version: int = 0,
    stats: MixtureStats | None = None,
) -> Iterator[GenerationResult]:
    """Yields one result per request, each as soon as it is finished; one that cannot be written is ABORTED and carries
    its ``error``, and the others go on."""
    raise NotImplementedError
