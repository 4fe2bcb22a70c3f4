"""What the sampler hands back.

Shape legend: L response tokens of one sample; every per-token list has L entries, indexed by the token it is about.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from opd.decoding.stats import MixtureStats

STOP, LENGTH, ERROR = "stop", "length", "error"  # MixtureSample.finish_reason


@dataclass(frozen=True, kw_only=True)
class MixtureSample:
    """One answer. Log-probs are in nats, at the sampling temperature.

    Attributes:
        index: place of its prompt in the list.
        teacher_prompt, student_prompt: after the chat template, as each model read them.
        text: without special tokens, and up to a stop string if one ended it.
        response_ids: up to and including the stop id, or the token that completed the stop string.
        mixture_log_probs: log of the probability with which each id was drawn (the behaviour policy's): log q, of the
            distributions after top-k and top-p.
        student_log_probs, teacher_log_probs: log softmax(logits / temperature), before top-k and top-p.
        alphas: the teacher's weight at each token, with ``track_alpha_stats``.
        finish_reason: "stop", "length" (``max_tokens`` or the context) or "error"; ``error`` then says why.
    """

    index: int
    teacher_prompt: str
    student_prompt: str
    teacher_prompt_ids: list[int] = field(default_factory=list)
    student_prompt_ids: list[int] = field(default_factory=list)
    text: str = ""
    response_ids: list[int] = field(default_factory=list)
    mixture_log_probs: list[float] = field(default_factory=list)
    student_log_probs: list[float] = field(default_factory=list)
    teacher_log_probs: list[float] = field(default_factory=list)
    alphas: list[float] | None = None
    finish_reason: str = ERROR
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class AlphaStats:
    """Of the teacher's weight over all tokens of all samples."""

    mean: float
    std: float  # population
    min: float
    max: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class SamplerStats:
    """Of one call. ``acceptance``: share of the student's drafts that were kept, of those judged; ``tokens_per_round``:
    tokens that an answer gains by one teacher forward (1 in lock-step). Both None where nothing was counted."""

    tokens: int
    seconds: float
    tokens_per_second: float
    acceptance: float | None
    tokens_per_round: float | None


@dataclass(frozen=True, kw_only=True)
class MixtureOutput:
    samples: list[MixtureSample]  # in the order of the prompts
    stats: SamplerStats
    alpha_stats: AlphaStats | None = None  # with track_alpha_stats

    @property
    def generated_texts(self) -> list[str]:
        return [sample.text for sample in self.samples]


def alpha_stats(samples: Sequence[MixtureSample]) -> AlphaStats | None:
    """None when no sample recorded its weights."""
    alphas = [alpha for sample in samples for alpha in sample.alphas or ()]
    if not alphas:
        return None
    mean = statistics.fmean(alphas)
    return AlphaStats(
        mean=mean,
        std=statistics.fmean((alpha - mean) ** 2 for alpha in alphas) ** 0.5,
        min=min(alphas),
        max=max(alphas),
        tokens=len(alphas),
    )


def sampler_stats(counters: MixtureStats, samples: Sequence[MixtureSample], *, seconds: float) -> SamplerStats:
    """
    Args:
        seconds: wall time of the call.
    """
    tokens = sum(len(sample.response_ids) for sample in samples)
    return SamplerStats(
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / max(seconds, 1e-9),
        acceptance=counters.acceptance,
        tokens_per_round=counters.tokens_per_round,
    )
