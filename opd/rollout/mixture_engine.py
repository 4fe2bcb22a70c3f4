"""Answers from the mixture of student and teacher (``opd.maths.mixture``), with a weight that may change over the run.

The student learns on prefixes that lie between its own and the teacher's: less lost than its own early in training,
closer to its own than the teacher's. A schedule moves the weight, usually from the teacher towards the student.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from opd.decoding.draft_length import DraftLength
from opd.decoding.mixture import write_mixture
from opd.decoding.stats import MixtureStats
from opd.rollout.torch_engine import TorchEngine
from opd.rollout.with_teacher import EngineWithTeacher, check_whole_distributions
from opd.types import GenerationRequest, GenerationResult, Mixture, SamplingParams


@dataclass(frozen=True, kw_only=True)
class ScaleSchedule:
    """``Mixture.scale`` of each rollout: from ``start`` (the first) to ``end`` (number ``rollouts``, and all later)."""

    start: float = 1.0
    end: float = 1.0
    rollouts: int = 1

    def at(self, finished: int) -> float:
        """After so many finished rollouts."""
        share = min(1.0, finished / max(1, self.rollouts - 1))
        return self.start + share * (self.end - self.start)


class MixtureEngine(EngineWithTeacher):
    """A student and a teacher in this process, who write from ``q`` together.

    Results carry ``log q``. A rollout of scale 0 is the student's own, and carries its log-probs.

    Args:
        teacher: may be ``student.model`` itself, which then reads the teacher's prompts beside the student's; it
            follows every weight sync.
        mixture: its scale is the schedule's to say.
        decoding: "speculative" or "lockstep": the same distribution.
        draft_tokens: of a speculative round; None: adapted to what is measured.
        teacher_max_context_len: tokens of the teacher's prompt and the answer.
    """

    stats_prefix = "mixture_"

    def __init__(
        self,
        student: TorchEngine,
        teacher: nn.Module,
        mixture: Mixture,
        *,
        schedule: ScaleSchedule,
        decoding: str = "speculative",
        draft_tokens: int | None = None,
        teacher_max_context_len: int,
    ) -> None:
        super().__init__(student, teacher)
        self._mixture = mixture
        self._schedule = schedule
        self._decoding = decoding
        self._draft_length = DraftLength(draft_tokens)
        self._teacher_max_context_len = teacher_max_context_len
        self._scale = 0.0
        self._decoded = MixtureStats()
        self._tokens = TokenSums()

    def generate(self, requests: list[GenerationRequest], params: SamplingParams) -> Iterator[GenerationResult]:
        """See ``RolloutEngine.generate``. An answer that cannot be written is ABORTED and carries its ``error``.

        Raises:
            ValueError: a temperature, top-p or top-k of which the trainer could not take the ratio.
        """
        check_whole_distributions(params, who="the mixture")
        # The version counts finished rollouts, also after a resume: the schedule needs no state of its own.
        self._scale = self._schedule.at(self.student.weight_version)
        results = self.student.generate(requests, params) if self._scale == 0 else self._together(requests, params)
        return self._counted(results)

    def _together(self, requests: list[GenerationRequest], params: SamplingParams) -> Iterator[GenerationResult]:
        return write_mixture(
            self.student.model,
            self.teacher,
            requests,
            params,
            replace(self._mixture, scale=self._scale),
            engine=self._decoding,
            draft_tokens=self._draft_length,
            max_running_requests=self.student.max_running_requests,
            max_context_len=self.student.max_context_len,
            teacher_max_context_len=self._teacher_max_context_len,
            weight_version=self.student.weight_version,
            stats=self._decoded,
        )

    def _counted(self, results: Iterator[GenerationResult]) -> Iterator[GenerationResult]:
        for result in results:
            self._tokens.add(result)
            yield result

    def take_stats(self) -> dict[str, float]:
        """Since the last call: ``scale``; and of the tokens drawn from ``q``: ``alpha_mean`` and ``alpha_std`` of the
        teacher's weight, ``kl_to_student`` and ``kl_to_teacher`` (means of log q - log p: one-sample estimates of
        KL(q || p), nats per token), ``tokens_per_round`` (of an answer, per forward pass of the teacher) and
        ``accepted_share`` of the drafted tokens that were judged."""
        decoded, tokens = self._decoded, self._tokens
        self._decoded, self._tokens = MixtureStats(), TokenSums()
        if tokens.answers == 0:
            return {}
        stats = {"scale": self._scale, **tokens.means()}
        measured = {"tokens_per_round": decoded.tokens_per_round, "accepted_share": decoded.acceptance}
        return stats | {name: value for name, value in measured.items() if value is not None}


@dataclass
class TokenSums:
    """Over the tokens of finished answers that say what they were drawn from."""

    answers: int = 0
    count: int = 0
    alpha: float = 0.0
    alpha_square: float = 0.0
    log_q: float = 0.0
    log_student: float = 0.0
    log_teacher: float = 0.0

    def add(self, result: GenerationResult) -> None:
        self.answers += 1
        if not result.alphas:
            return
        self.count += len(result.alphas)
        self.alpha += sum(result.alphas)
        self.alpha_square += sum(a * a for a in result.alphas)
        self.log_q += sum(result.log_probs)
        self.log_student += sum(result.student_log_probs or ())
        self.log_teacher += sum(result.teacher_log_probs or ())

    def means(self) -> dict[str, float]:
        if self.count == 0:
            return {}
        mean = self.alpha / self.count
        return {
            "alpha_mean": mean,
            "alpha_std": math.sqrt(max(0.0, self.alpha_square / self.count - mean * mean)),
            "kl_to_student": (self.log_q - self.log_student) / self.count,
            "kl_to_teacher": (self.log_q - self.log_teacher) / self.count,
        }
