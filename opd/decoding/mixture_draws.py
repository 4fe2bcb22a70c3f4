"""Logits of both models -> the mixture at each position, and what is reported of a token.

Shape legend: B positions (of several answers), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from opd.decoding.draws import truncate
from opd.maths.mixture import Mixed, mix, mixed_logprobs_at
from opd.types import Mixture, SamplingParams


@dataclass(frozen=True)
class Scaled:
    """One model's logits over the temperature. ``kept_BV`` is -inf outside top-k and top-p; the same tensor without."""

    full_BV: torch.Tensor
    kept_BV: torch.Tensor

    @classmethod
    def stack(cls, parts: Sequence[Scaled]) -> Scaled:
        """K parts of R positions each as one of R * K, a row's K side by side."""
        full = torch.stack([part.full_BV for part in parts], 1).flatten(0, 1)
        if all(part.kept_BV is part.full_BV for part in parts):
            return cls(full, full)
        return cls(full, torch.stack([part.kept_BV for part in parts], 1).flatten(0, 1))

    def weights_BV(self) -> torch.Tensor:
        """Of the kept tokens, the largest 1."""
        return (self.kept_BV - self.kept_BV.amax(-1, keepdim=True)).exp()

    def kept_logprobs_at(self, ids_B: torch.Tensor, norm_B: torch.Tensor) -> torch.Tensor:
        """Of the truncated distribution, nats; ``norm_B``: logsumexp of what is kept."""
        return self.kept_BV.gather(1, ids_B[:, None])[:, 0] - norm_B

    def full_logprobs_at(self, ids_B: torch.Tensor, kept_norm_B: torch.Tensor) -> torch.Tensor:
        """Of the whole distribution, nats."""
        norm_B = kept_norm_B if self.kept_BV is self.full_BV else self.full_BV.logsumexp(-1)
        return self.full_BV.gather(1, ids_B[:, None])[:, 0] - norm_B


class MixtureDraws:
    """The sampling parameters and the mixture, applied to logits."""

    def __init__(self, params: SamplingParams, mixture: Mixture) -> None:
        self._params = params
        self._mixture = mixture

    def scale(self, logits_BV: torch.Tensor) -> Scaled:
        full_BV = logits_BV.float() / self._params.temperature
        if self._params.top_k <= 0 and self._params.top_p >= 1:
            return Scaled(full_BV, full_BV)
        return Scaled(full_BV, truncate(full_BV, top_k=self._params.top_k, top_p=self._params.top_p))

    def mix(self, student: Scaled, teacher: Scaled) -> Mixed:
        rule = self._mixture
        return mix(student.kept_BV, teacher.kept_BV, method=rule.method, fixed_alpha=rule.fixed_alpha, scale=rule.scale)


def rows_of(mixed: Mixed, index_J: torch.Tensor) -> Mixed:
    """The mixture of some rows."""
    return Mixed(**{field.name: getattr(mixed, field.name)[index_J] for field in fields(mixed)})


def columns_of(mixed: Mixed, student: Scaled, teacher: Scaled, ids_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fields of ``GenerationResult`` with one entry per position, on the CPU."""
    values = torch.stack(
        [
            mixed_logprobs_at(mixed, student.kept_BV, teacher.kept_BV, ids_B),
            student.full_logprobs_at(ids_B, mixed.student_norm_B),
            teacher.full_logprobs_at(ids_B, mixed.teacher_norm_B),
            mixed.alpha_B,
        ]
    ).cpu()
    return dict(zip(("log_probs", "student_log_probs", "teacher_log_probs", "alphas"), values, strict=True))
