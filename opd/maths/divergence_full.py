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

from opd.maths.vocab_parallel import all_reduce_max, all_reduce_sum, exp_into

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
    shift_s, (exp_s, shift_t, exp_t, work) = grad_BV, scratch
    sum_s_B = exp_into(student_BV, temperature=temperature, group=group, shifted_BV=shift_s, exp_BV=exp_s)
    sum_t_B = exp_into(teacher_BV, temperature=temperature, group=group, shifted_BV=shift_t, exp_BV=exp_t)
    log_sum_s_B, log_sum_t_B = sum_s_B.log(), sum_t_B.log()
    agree_B = same_top(shift_s, shift_t, group, work)
    dots = [dot(exp_s, shift_s, work), dot(exp_t, shift_t, work)]

    if kind == "forward_kl":
        dots += [dots[0], dot(exp_t, shift_t.sub_(shift_s), work)]
    elif kind == "reverse_kl":
        dots += [dot(exp_s, shift_s.sub_(shift_t), work), dots[1]]
    else:
        log_m = torch.mul(exp_t, (beta / sum_t_B)[:, None], out=work).addcmul_(exp_s, ((1 - beta) / sum_s_B)[:, None])
        log_m.clamp_min_(torch.finfo(log_m.dtype).tiny).log_()  # below that s and t are 0, and so is their share
        shift_s.sub_(log_m)
        shift_t.sub_(log_m)
        dots += [dot(exp_s, shift_s, work), dot(exp_t, shift_t, work)]
    negentropy_s_B, negentropy_t_B, under_s_B, under_t_B = all_reduce_sum(torch.stack(dots), group).unbind()

    under_s_B, under_t_B = under_s_B / sum_s_B, under_t_B / sum_t_B
    if kind == "forward_kl":
        value_B = infinite_if_huge(under_t_B - log_sum_t_B + log_sum_s_B)
        if need_grad:
            torch.mul(exp_s, (1 / (temperature * sum_s_B))[:, None], out=grad_BV)
            grad_BV.addcmul_(exp_t, (1 / (temperature * sum_t_B))[:, None], value=-1)
    else:
        # shift_s, which is grad_BV, now holds log(s / t), or log(s / m), up to a constant of the row.
        under_s_B = infinite_if_huge(under_s_B)
        if kind == "reverse_kl":
            value_B = under_s_B - log_sum_s_B + log_sum_t_B
        else:
            value_B = beta * (under_t_B - log_sum_t_B) + (1 - beta) * (under_s_B - log_sum_s_B)
        if need_grad:
            share = 1.0 if kind == "reverse_kl" else 1 - beta
            grad_BV.sub_(under_s_B[:, None]).mul_(exp_s).mul_((share / (temperature * sum_s_B))[:, None])
    return RowSums(
        value_B=value_B,
        student_entropy_B=log_sum_s_B - negentropy_s_B / sum_s_B,
        teacher_entropy_B=log_sum_t_B - negentropy_t_B / sum_t_B,
        top1_agree_B=agree_B,
        tail_mass_B=torch.zeros_like(value_B),
    )


def dot(left_BV: torch.Tensor, right_BV: torch.Tensor, work_BV: torch.Tensor) -> torch.Tensor:
    """Sum over this rank's columns of the product, through a buffer."""
    return torch.mul(left_BV, right_BV, out=work_BV).sum(dim=-1)


def same_top(
    shifted_s_BV: torch.Tensor, shifted_t_BV: torch.Tensor, group: dist.ProcessGroup | None, work_BV: torch.Tensor
) -> torch.Tensor:
    """1.0 where one column holds both maxima: both are shifted to 0, and only there does their sum reach 0. Costs a
    fifth of two argmax and needs no exchange of indices."""
    best_B = all_reduce_max(torch.add(shifted_s_BV, shifted_t_BV, out=work_BV).amax(dim=-1), group)
    return (best_B >= 0).to(shifted_s_BV.dtype)


def infinite_if_huge(value_B: torch.Tensor) -> torch.Tensor:
    """A divergence that is infinite (mass on an outcome of probability 0) is reported as such, not as 1e29 nats."""
    return torch.where(value_B > _INFINITE, torch.full_like(value_B, torch.inf), value_B)
