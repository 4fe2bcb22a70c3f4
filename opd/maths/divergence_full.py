"""Divergence of whole distributions and its gradient, for one block of rows.

``s`` is the student, ``t`` the teacher, both at one temperature T; values in nats.

* reverse_kl, ``d = KL(s || t)``: gradient on the student's logits ``s (log s - log t - d) / T``;
* forward_kl, ``KL(t || s)``: ``(s - t) / T``;
* gkd, ``m = beta t + (1 - beta) s``, ``beta KL(t || m) + (1 - beta) KL(s || m)`` (arXiv 2306.13649, eq. 1), with
  ``g = (1 - beta) log(s / m)``: ``s (g - sum s g) / T``. The part through m cancels: its derivative is ``-sum dm = 0``.

Shapes: B rows, V this rank's slice of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd.maths.vocab_parallel import all_reduce_max, all_reduce_sum, log_softmax_into

SCRATCH = 4  # [B, V] buffers that `full_rows` needs besides the one for the gradient
_INFINITE = 1e20  # nats; only `LOG_ZERO` under a probability above 0 gives a value as large


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """What a block of rows gives besides the gradient, [B] each, equal on all ranks."""

    value_B: torch.Tensor
    student_entropy_B: torch.Tensor
    teacher_entropy_B: torch.Tensor
    top1_agree_B: torch.Tensor
    tail_mass_B: torch.Tensor


def full_rows(
    student_BV: torch.Tensor,
    teacher_BV: torch.Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float,
    group: dist.ProcessGroup | None,
    grad_BV: torch.Tensor,
    scratch: list[torch.Tensor],
    need_grad: bool,
) -> RowSums:
    """``kind`` is reverse_kl, forward_kl, or gkd with 0 < beta < 1.

    ``grad_BV`` receives the gradient (and serves as a buffer where none is needed); it may be ``student_BV`` itself.
    """
    log_s, (prob_s, log_t, prob_t, work) = grad_BV, scratch
    top_s_B = log_softmax_into(student_BV, temperature=temperature, group=group, log_BV=log_s, prob_BV=prob_s)
    top_t_B = log_softmax_into(teacher_BV, temperature=temperature, group=group, log_BV=log_t, prob_BV=prob_t)
    agree_B = same_top(log_s, log_t, top_s_B, top_t_B, group, work)
    negentropy_s_B, negentropy_t_B = dot(prob_s, log_s, work), dot(prob_t, log_t, work)

    if kind == "forward_kl":
        value_B = dot(prob_t, log_t.sub_(log_s), work)
        mean_B = None
    elif kind == "reverse_kl":
        value_B = dot(prob_s, log_s.sub_(log_t), work)  # log_s now holds log(s / t)
        mean_B = value_B
    else:
        log_m = torch.mul(prob_t, beta, out=work).add_(prob_s, alpha=1 - beta)
        log_m.clamp_min_(torch.finfo(log_m.dtype).tiny).log_()  # below that s and t are 0, and so is their share
        log_s.sub_(log_m)  # log(s / m)
        log_t.sub_(log_m)  # log(t / m)
        mean_B = dot(prob_s, log_s, work)
        value_B = beta * dot(prob_t, log_t, work) + (1 - beta) * mean_B
    sums = [value_B, negentropy_s_B, negentropy_t_B] + ([mean_B] if kind == "gkd" else [])
    value_B, negentropy_s_B, negentropy_t_B, *rest = all_reduce_sum(torch.stack(sums), group).unbind()
    value_B = infinite_if_huge(value_B)

    if need_grad and kind == "forward_kl":
        scale_(torch.sub(prob_s, prob_t, out=grad_BV), 1 / temperature)
    elif need_grad:
        mean_B = rest[0] if kind == "gkd" else value_B
        grad_BV.sub_(mean_B[:, None]).mul_(prob_s)
        scale_(grad_BV, (1 - beta if kind == "gkd" else 1.0) / temperature)
    return RowSums(
        value_B=value_B,
        student_entropy_B=-negentropy_s_B,
        teacher_entropy_B=-negentropy_t_B,
        top1_agree_B=agree_B,
        tail_mass_B=torch.zeros_like(value_B),
    )


def dot(left_BV: torch.Tensor, right_BV: torch.Tensor, work_BV: torch.Tensor) -> torch.Tensor:
    """Sum over this rank's columns of the product, through a buffer."""
    return torch.mul(left_BV, right_BV, out=work_BV).sum(dim=-1)


def same_top(
    log_s_BV: torch.Tensor,
    log_t_BV: torch.Tensor,
    top_s_B: torch.Tensor,
    top_t_B: torch.Tensor,
    group: dist.ProcessGroup | None,
    work_BV: torch.Tensor,
) -> torch.Tensor:
    """1.0 where one column holds both maxima. The sum of the logs reaches the sum of the maxima only there, which costs
    a fifth of two argmax and needs no exchange of indices."""
    best_B = all_reduce_max(torch.add(log_s_BV, log_t_BV, out=work_BV).amax(dim=-1), group)
    return (best_B >= top_s_B + top_t_B).to(log_s_BV.dtype)


def infinite_if_huge(value_B: torch.Tensor) -> torch.Tensor:
    """A divergence that is infinite (mass on an outcome of probability 0) is reported as such, not as 1e29 nats."""
    return torch.where(value_B > _INFINITE, torch.full_like(value_B, torch.inf), value_B)


def scale_(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """In place; saves the pass over memory when there is nothing to scale."""
    return tensor if factor == 1.0 else tensor.mul_(factor)
