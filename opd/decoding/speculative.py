"""Speculative sampling from the mixture: the student drafts, one pass of the teacher judges all drafts.

Exact: every token has the distribution ``q``, whatever the number of drafts. Each position has its own three numbers
of noise (draft, verdict, replacement), and a draft after a rejection is forgotten before its numbers were looked at by
anything that stays, so that the text does not even depend on how many tokens were drafted in which round.

There is no bonus token after k accepted drafts: it would need the student's distribution at one more position, which
costs what one more draft costs.

Shape legend: R answers being written, K drafts, V vocabulary.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from opd.decoding.draft_length import DraftLength
from opd.decoding.draws import draw_weighted
from opd.decoding.loop import Answer, Chunk, chunk
from opd.decoding.mixture_draws import MixtureDraws, Scaled, columns_of, rows_of
from opd.decoding.stats import MixtureStats
from opd.decoding.views import View, Views
from opd.maths.mixture import mixed_logprobs, mixed_logprobs_at
from opd.maths.speculative import kept_drafts, replacement_weights

STUDENT, TEACHER = 0, 1
DRAFT, VERDICT, REPLACEMENT = 0, 1, 2  # columns of the noise


class Speculative:
    """A ``Writer``."""

    draws_per_token = 3

    def __init__(
        self, student: nn.Module, teacher: nn.Module, draws: MixtureDraws, length: DraftLength, stats: MixtureStats
    ) -> None:
        self.views = [View(model=student), View(model=teacher, is_teacher=True)]
        self.lookahead = length.longest
        self._draws = draws
        self._length = length
        self._stats = stats

    def advance(self, caches: Views, answers: list[Answer]) -> list[Chunk]:
        started = time.perf_counter()
        rows = len(answers)
        k = min(self._length.choose(rows), max(answer.limit - len(answer.ids) for answer in answers))
        uniforms_RKD = torch.from_numpy(np.stack([answer.uniforms(k) for answer in answers])).to(caches.device)
        student, drafts_RK = self._draft(caches, answers, uniforms_RKD[..., DRAFT])
        teacher = self._judge(caches, answers, drafts_RK)

        mixed = self._draws.mix(student, teacher)
        log_q_RK = mixed_logprobs_at(mixed, student.kept_BV, teacher.kept_BV, drafts_RK.flatten()).view(rows, k)
        log_s_RK = student.kept_logprobs_at(drafts_RK.flatten(), mixed.student_norm_B).view(rows, k)
        kept = kept_drafts(log_s_RK, log_q_RK, uniforms_RKD[..., VERDICT]).tolist()
        ids_RK = drafts_RK
        rejected = [(row, count) for row, count in enumerate(kept) if count < k]
        if rejected:
            where = torch.tensor([row * k + count for row, count in rejected], device=caches.device)
            log_q_JV = mixed_logprobs(rows_of(mixed, where), student.kept_BV[where], teacher.kept_BV[where])
            log_s_JV = student.kept_BV[where] - mixed.student_norm_B[where][:, None]
            noise_J = uniforms_RKD[..., REPLACEMENT].flatten()[where]
            fixed_J = draw_weighted(replacement_weights(log_s_JV, log_q_JV), noise_J)
            ids_RK = drafts_RK.flatten().index_copy(0, where, fixed_J).view(rows, k)
        listed = {
            name: values.tolist() for name, values in columns_of(mixed, student, teacher, ids_RK.flatten()).items()
        }
        chunks = [
            chunk(ids[: count + 1], listed, first=row * k)
            for row, (ids, count) in enumerate(zip(ids_RK.tolist(), kept, strict=True))
        ]

        judged = sum(min(count + 1, k) for count in kept)
        self._stats.add_round(rows, judged=judged, accepted=sum(kept))
        self._length.observe(rows, k, seconds=time.perf_counter() - started, judged=judged, accepted=sum(kept))
        return chunks

    def _draft(self, caches: Views, answers: list[Answer], uniforms_RK: torch.Tensor) -> tuple[Scaled, torch.Tensor]:
        """The student's logits [R * K, V] and what was drawn from them, [R, K]."""
        lengths = [answer.lengths[STUDENT] for answer in answers]
        starts_R = torch.tensor(lengths, device=caches.device) - 1
        ids_R = torch.tensor([answer.last_tokens[STUDENT] for answer in answers], device=caches.device)
        parts, drafts = [], []
        for i in range(uniforms_RK.shape[1]):
            logits = caches.extend(STUDENT, ids_R[:, None], starts_R + i, visible=max(lengths) + i)
            parts.append(self._draws.scale(logits[:, 0]))
            ids_R = draw_weighted(parts[-1].weights_BV(), uniforms_RK[:, i])
            drafts.append(ids_R)
        return Scaled.stack(parts), torch.stack(drafts, 1)

    def _judge(self, caches: Views, answers: list[Answer], drafts_RK: torch.Tensor) -> Scaled:
        """The teacher's logits [R * K, V] at the drafts' positions."""
        lengths = [answer.lengths[TEACHER] for answer in answers]
        last_R1 = torch.tensor([[answer.last_tokens[TEACHER]] for answer in answers], device=caches.device)
        starts_R = torch.tensor(lengths, device=caches.device) - 1
        ids_RK = torch.cat([last_R1, drafts_RK[:, :-1]], 1)
        logits_RKV = caches.extend(TEACHER, ids_RK, starts_R, visible=max(lengths) + drafts_RK.shape[1] - 1)
        return self._draws.scale(logits_RKV.flatten(0, 1))
