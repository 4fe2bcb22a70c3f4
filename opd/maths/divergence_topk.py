"""Divergence of K kept tokens and one bucket that holds the rest of each side's mass; and its gradient.

Merging outcomes never raises a divergence, so the value is a lower bound of the full one, and equal to it when every
token is kept. It is a divergence of two true distributions: dropping the bucket, or clamping what is left at 0, would
lose loss and gradient wherever the student has more mass than the teacher outside the kept tokens.

With bucket probabilities p (student) and q (teacher), value D(p, q) and ``h_b = dD / dp_b``, the gradient on the logit
of token j in bucket b is ``s_j (h_b - sum p h) / T``: dense, for all tokens outside share the tail's ``h``.

Shapes: B rows, V this rank's slice of the vocabulary, K kept ids (of the whole vocabulary, -1 for an unused place).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from opd.maths.divergence_full import RowSums, dot, infinite_if_huge, same_top
from opd.maths.vocab_parallel import (
    LOG_ZERO,
    all_reduce_sum,
    exp_into,
    gather_logprobs,
    locate,
    top_ids,
    vocabulary_size,
)

SCRATCH = 4  # [B, V] buffers that `topk_rows` needs besides the one for the gradient
SPARSE_SCRATCH = 2  # the same for `sparse_rows`


def topk_rows(
    student_BV: torch.Tensor,
    teacher_BV: torch.Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float,
    top_k: int,
    support: str,
    group: dist.ProcessGroup | None,
    grad_BV: torch.Tensor,
    scratch: list[torch.Tensor],
    need_grad: bool,
) -> RowSums:
    """Both distributions are known in full; ``support`` says whose ``top_k`` likeliest tokens are kept."""
    shift_s, (exp_s, shift_t, exp_t, work) = grad_BV, scratch
    sum_s_B = exp_into(student_BV, temperature=temperature, group=group, shifted_BV=shift_s, exp_BV=exp_s)
    sum_t_B = exp_into(teacher_BV, temperature=temperature, group=group, shifted_BV=shift_t, exp_BV=exp_t)
    agree_B = same_top(shift_s, shift_t, group, work)
    dots = torch.stack([dot(exp_s, shift_s, work), dot(exp_t, shift_t, work)])
    negentropy_s_B, negentropy_t_B = all_reduce_sum(dots, group).unbind()

    ids_BK = keep_ids(shift_s, shift_t, top_k, support, group)
    log_t_BK = gather_logprobs(shift_t, sum_t_B, ids_BK, group)
    tail_t_B = all_reduce_sum(remove_kept_(exp_t, ids_BK, group).sum(dim=-1), group) / sum_t_B
    value_B, tail_s_B = _buckets(
        shift_s, exp_s, sum_s_B, ids_BK, log_t_BK, tail_t_B, kind=kind, beta=beta, temperature=temperature,
        group=group, grad_BV=grad_BV if need_grad else None,
    )  # fmt: skip
    return RowSums(
        value_B=value_B,
        student_entropy_B=sum_s_B.log() - negentropy_s_B / sum_s_B,
        teacher_entropy_B=sum_t_B.log() - negentropy_t_B / sum_t_B,
        top1_agree_B=agree_B,
        tail_mass_B=tail_s_B,
    )


def sparse_rows(
    student_BV: torch.Tensor,
    ids_BK: torch.Tensor,
    teacher_logprobs_BK: torch.Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float,
    group: dist.ProcessGroup | None,
    grad_BV: torch.Tensor,
    scratch: list[torch.Tensor],
    need_grad: bool,
) -> RowSums:
    """The teacher is known at ``ids_BK`` only: its tail is what the kept ones leave of 1.

    The teacher's entropy is that of the K + 1 buckets, and its favourite is the likeliest of the kept ids.
    """
    shift_s, (exp_s, work) = grad_BV, scratch
    sum_s_B = exp_into(student_BV, temperature=temperature, group=group, shifted_BV=shift_s, exp_BV=exp_s)
    negentropy_s_B = all_reduce_sum(dot(exp_s, shift_s, work), group)
    log_t_BK = torch.where(ids_BK >= 0, teacher_logprobs_BK.to(shift_s.dtype), LOG_ZERO).clamp_min_(LOG_ZERO)
    favourite_B1 = ids_BK.gather(1, log_t_BK.argmax(dim=-1, keepdim=True))
    # The student's largest log-prob is exactly 0 - log sum.
    agree_B = gather_logprobs(shift_s, sum_s_B, favourite_B1, group)[:, 0] >= -sum_s_B.log()

    # 1 - sum exp without cancellation where little is kept; near 1 the log-probs' own rounding (eps) is all it shows.
    tail_t_B = (-torch.expm1(log_t_BK.logsumexp(dim=-1).clamp_max(0))).clamp_min(torch.finfo(shift_s.dtype).eps)
    all_kept_B = (ids_BK >= 0).sum(dim=-1) >= vocabulary_size(shift_s.shape[1], group)
    tail_t_B = tail_t_B.masked_fill(all_kept_B, 0.0)
    value_B, tail_s_B = _buckets(
        shift_s, exp_s, sum_s_B, ids_BK, log_t_BK, tail_t_B, kind=kind, beta=beta, temperature=temperature,
        group=group, grad_BV=grad_BV if need_grad else None,
    )  # fmt: skip
    return RowSums(
        value_B=value_B,
        student_entropy_B=sum_s_B.log() - negentropy_s_B / sum_s_B,
        teacher_entropy_B=-(log_t_BK.exp() * log_t_BK).sum(-1) - tail_t_B * _log_mass(tail_t_B),
        top1_agree_B=agree_B.to(shift_s.dtype),
        tail_mass_B=tail_s_B,
    )


def keep_ids(
    scores_s_BV: torch.Tensor, scores_t_BV: torch.Tensor, top_k: int, support: str, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """The kept ids, [B, top_k], or [B, 2 top_k] for the union with -1 in place of what both chose."""
    if support == "student":
        return top_ids(scores_s_BV, top_k, group)
    teachers_BK = top_ids(scores_t_BV, top_k, group)
    if support == "teacher":
        return teachers_BK
    students_BK = top_ids(scores_s_BV, top_k, group)
    seen_BK = (students_BK[:, :, None] == teachers_BK[:, None, :]).any(dim=-1)
    return torch.cat([teachers_BK, students_BK.masked_fill(seen_BK, -1)], dim=1)


def remove_kept_(exp_BV: torch.Tensor, ids_BK: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sets the kept columns to 0, so that what is left sums to the tail without ``1 - (almost 1)``."""
    column_BK, here_BK = locate(ids_BK, exp_BV.shape[1], group)
    # x - x is exactly 0; adding 0 for an unused place disturbs no other (an assignment there could).
    return exp_BV.scatter_add_(1, column_BK, torch.where(here_BK, -exp_BV.gather(1, column_BK), 0.0))


def bucket_divergence(
    log_s_BK: torch.Tensor,
    log_t_BK: torch.Tensor,
    tail_s_B: torch.Tensor,
    tail_t_B: torch.Tensor,
    *,
    kind: str,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value [B]; ``s_j (h_j - sum p h)`` of the kept tokens [B, K]; ``h_tail - sum p h`` [B], which the other tokens
    multiply with their own probability."""
    s = torch.cat([log_s_BK.exp(), tail_s_B[:, None]], dim=1)
    t = torch.cat([log_t_BK.exp(), tail_t_B[:, None]], dim=1)
    log_s = torch.cat([log_s_BK, _log_mass(tail_s_B)[:, None]], dim=1)
    log_t = torch.cat([log_t_BK, _log_mass(tail_t_B)[:, None]], dim=1)
    if kind == "forward_kl":
        # h = -t / p and sum p h = -1, written so that a token with p = 0 is no 0 / 0.
        value_B = infinite_if_huge((t * (log_t - log_s)).sum(dim=-1))
        return value_B, (s - t)[:, :-1], 1 - (log_t - log_s)[:, -1].exp()
    if kind == "reverse_kl":
        value_B = infinite_if_huge((s * (log_s - log_t)).sum(dim=-1))
        h, mean_B = log_s - log_t, value_B
    else:
        log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=torch.float64).log().tolist()
        log_m = torch.logaddexp(log_t + log_beta, log_s + log_rest)
        h = (1 - beta) * (log_s - log_m)
        mean_B = (s * h).sum(dim=-1)
        value_B = beta * (t * (log_t - log_m)).sum(dim=-1) + mean_B
    centred = h - mean_B[:, None]
    return value_B, (s * centred)[:, :-1], centred[:, -1]


def _buckets(
    shifted_s_BV: torch.Tensor,
    exp_s_BV: torch.Tensor,
    sum_s_B: torch.Tensor,
    ids_BK: torch.Tensor,
    log_t_BK: torch.Tensor,
    tail_t_B: torch.Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float,
    group: dist.ProcessGroup | None,
    grad_BV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, student's tail mass), [B] each; fills ``grad_BV``, which may be ``shifted_s_BV``, if given. Changes
    ``exp_s_BV``."""
    log_s_BK = gather_logprobs(shifted_s_BV, sum_s_B, ids_BK, group)
    tail_s_B = all_reduce_sum(remove_kept_(exp_s_BV, ids_BK, group).sum(dim=-1), group) / sum_s_B
    value_B, kept_BK, tail_B = bucket_divergence(log_s_BK, log_t_BK, tail_s_B, tail_t_B, kind=kind, beta=beta)
    if grad_BV is not None:
        column_BK, here_BK = locate(ids_BK, exp_s_BV.shape[1], group)
        torch.mul(exp_s_BV, (tail_B / (temperature * sum_s_B))[:, None], out=grad_BV)  # kept columns are 0 here
        grad_BV.scatter_add_(1, column_BK, torch.where(here_BK, kept_BK / temperature, 0.0))
    return value_B, tail_s_B


def _log_mass(mass_B: torch.Tensor) -> torch.Tensor:
    """Log of a tail's mass. An empty tail weighs 0, so that any finite log will do: the smallest normal number's."""
    return mass_B.clamp_min(torch.finfo(mass_B.dtype).tiny).log()
