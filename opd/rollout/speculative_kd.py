"""Speculative KD (arXiv 2410.11325): the student writes, the teacher replaces what it finds unlikely.

At each position the student proposes a token; when it is not among the teacher's K likeliest, the teacher's own draw
takes its place. Early in training the teacher writes most of an answer, later the student does.

Shape legend: R answers being written, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from opd.decoding.draws import sample_tokens
from opd.decoding.loop import write_answers
from opd.rollout.torch_engine import TorchEngine
from opd.rollout.with_teacher import EngineWithTeacher, check_whole_distributions
from opd.types import GenerationRequest, GenerationResult, SamplingParams


class SpeculativeKDEngine(EngineWithTeacher):
    """A student and a frozen teacher in this process, one token of both at a time.

    The behaviour distribution at a prefix is, with ``s`` and ``t`` the softmax of the student's and the teacher's
    logits, both divided by the rollout temperature and over the whole vocabulary, and ``K(t)`` the teacher's K
    likeliest tokens (those with the logit of the K-th included)::

        q(a) = s(a) [a in K(t)] + (1 - s(K(t))) t(a)

    A replacement may be any token of the vocabulary, as in the paper.
    """

    stats_prefix = "teacher_"

    def __init__(self, student: TorchEngine, teacher: nn.Module, *, top_k: int) -> None:
        super().__init__(student, teacher)
        self._top_k = top_k
        self._written = 0
        self._replaced = 0

    def generate(self, requests: list[GenerationRequest], params: SamplingParams) -> Iterator[GenerationResult]:
        """See ``RolloutEngine.generate``.

        Raises:
            ValueError: a prompt that leaves no room for an answer, or a temperature, top-p or top-k under which ``q``
                is not the distribution above.
        """
        check_whole_distributions(params, who="speculative KD")

        def draw(logits: list[torch.Tensor], uniforms_R2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            ids_R, logprobs_R, replaced_R = draw_tokens(*logits, uniforms_R2, params, top_k=self._top_k)
            self._written += len(replaced_R)
            self._replaced += int(replaced_R.sum())
            return ids_R, logprobs_R

        return write_answers(
            [self.student.model, self.teacher],
            requests,
            params,
            draw,
            draws_per_token=2,
            max_running_requests=self.student.max_running_requests,
            max_context_len=self.student.max_context_len,
            weight_version=self.student.weight_version,
        )

    def take_stats(self) -> dict[str, float]:
        """``replaced_share``: tokens that the teacher replaced, of those written since the last call."""
        if self._written == 0:
            return {}
        share = self._replaced / self._written
        self._written = self._replaced = 0
        return {"replaced_share": share}


def draw_tokens(
    student_logits_RV: torch.Tensor,
    teacher_logits_RV: torch.Tensor,
    uniforms_R2: torch.Tensor,
    params: SamplingParams,
    *,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One draw per row from ``q`` (see the class): token ids, ``log q`` of them in nats, and which were replaced.

    Args:
        uniforms_R2: the first decides the proposal, the second the replacement.
    """
    ids_R, _ = sample_tokens(student_logits_RV, uniforms_R2[:, 0], params)
    student_RV = (student_logits_RV.float() / params.temperature).log_softmax(-1)
    teacher_RV = (teacher_logits_RV.float() / params.temperature).log_softmax(-1)
    threshold_R1 = teacher_RV.topk(min(top_k, teacher_RV.shape[-1]), dim=-1).values[:, -1:]
    likely_RV = teacher_RV >= threshold_R1

    replaced_R = ~likely_RV.gather(1, ids_R[:, None])[:, 0]
    if bool(replaced_R.any()):
        ids_R = ids_R.clone()
        ids_R[replaced_R], _ = sample_tokens(teacher_logits_RV[replaced_R], uniforms_R2[replaced_R, 1], params)

    log_rejected_R = student_RV.masked_fill(likely_RV, -torch.inf).logsumexp(-1)  # of the mass outside: no 1 - x
    kept_R = student_RV.masked_fill(~likely_RV, -torch.inf).gather(1, ids_R[:, None])[:, 0]
    replacing_R = log_rejected_R + teacher_RV.gather(1, ids_R[:, None])[:, 0]
    return ids_R, torch.logaddexp(kept_R, replacing_R), replaced_R
