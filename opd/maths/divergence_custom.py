"""A divergence that somebody else wrote, computed as those of `opd.maths.divergence` are: block by block, with its
gradient.

The function is given log-probs and nothing else. Softmax, gradient on the logits and slices of the vocabulary are done
here. With ``g = d D / d log s`` from autograd, the gradient on the student's logits is ``(g - s sum g) / T``, where
``s`` is the student's softmax at temperature T. The autograd graph is that of one block, and is gone after it.

Shapes: B rows of a block, V this rank's slice of the vocabulary, padding included, N its real tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from opd.errors import ResultError
from opd.maths.divergence import ChunkDivergence, check_logits, in_blocks
from opd.maths.divergence_full import RowSums, dot, infinite_if_huge
from opd.maths.vocab_parallel import all_reduce_max, all_reduce_sum, log_softmax_into

SCRATCH = 3  # [B, V] buffers that `custom_rows` needs besides the one for the gradient

# (student's log-probs, teacher's), [B, N] each -> [B], or [B, N] terms whose sum over a row is its divergence; nats,
# differentiable in the first, every row by itself. With several ranks to a vocabulary: terms, every column by itself.
DivergenceFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def custom_divergence_and_grad(
    student_logits_CV: torch.Tensor,
    teacher_logits_CV: torch.Tensor,
    *,
    function: DivergenceFn,
    real_columns: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    need_grad: bool = True,
    out: torch.Tensor | None = None,
) -> ChunkDivergence:
    """`divergence_and_grad` of a function of the user's; see `DivergenceFn`.

    Raises:
        ValueError: as `divergence`.
        ResultError: the function gave no tensor of a shape that it may give.
    """
    check_logits(student_logits_CV, teacher_logits_CV, None, group)
    student_CV, teacher_CV = student_logits_CV.detach(), teacher_logits_CV.detach()

    def block(rows: slice, grad_BV: torch.Tensor, scratch: list[torch.Tensor]) -> RowSums:
        return custom_rows(
            student_CV[rows], teacher_CV[rows], function=function, real_columns=real_columns,
            temperature=temperature, group=group, grad_BV=grad_BV, scratch=scratch, need_grad=need_grad,
        )  # fmt: skip

    return in_blocks(block, student_CV, buffers=SCRATCH, need_grad=need_grad, out=out)


def custom_rows(
    student_BV: torch.Tensor,
    teacher_BV: torch.Tensor,
    *,
    function: DivergenceFn,
    real_columns: int,
    temperature: float,
    group: dist.ProcessGroup | None,
    grad_BV: torch.Tensor,
    scratch: list[torch.Tensor],
    need_grad: bool,
) -> RowSums:
    """As `divergence_full.full_rows`. Columns from ``real_columns`` on are padding, which the function does not see.

    Raises:
        ResultError: see ``_called``.
    """
    prob_s, (log_s, log_t, work) = grad_BV, scratch
    top_t_B = log_softmax_into(teacher_BV, temperature=temperature, group=group, log_BV=log_t, prob_BV=work)
    negentropy_t_B = dot(work, log_t, work)
    top_s_B = log_softmax_into(student_BV, temperature=temperature, group=group, log_BV=log_s, prob_BV=prob_s)
    negentropy_s_B = dot(prob_s, log_s, work)
    best_B = all_reduce_max(torch.add(log_s, log_t, out=work).amax(dim=-1), group)  # one column with both maxima?

    student_BN = log_s[:, :real_columns].detach().requires_grad_(need_grad)
    with torch.set_grad_enabled(need_grad):
        value = _called(function, student_BN, log_t[:, :real_columns], by_columns=group is not None)
        slope_BN = torch.autograd.grad(value.sum(), student_BN)[0] if need_grad else None
    value_B = value.detach() if value.dim() == 1 else value.detach().sum(dim=-1)
    sums = torch.stack([negentropy_s_B, negentropy_t_B, value_B.to(log_s.dtype)])
    negentropy_s_B, negentropy_t_B, value_B = all_reduce_sum(sums, group).unbind()
    if slope_BN is not None:
        prob_s.mul_(-all_reduce_sum(slope_BN.sum(dim=-1), group)[:, None])
        prob_s[:, :real_columns] += slope_BN
        prob_s.div_(temperature)
    return RowSums(
        value_B=infinite_if_huge(value_B),
        student_entropy_B=-negentropy_s_B,
        teacher_entropy_B=-negentropy_t_B,
        top1_agree_B=(best_B >= top_s_B + top_t_B).to(log_s.dtype),
        tail_mass_B=torch.zeros_like(value_B),
    )


def check_function(function: DivergenceFn, *, by_columns: bool) -> None:
    """Tries ``function`` on a few rows; what it raises itself goes through.

    Args:
        by_columns: it will see slices of the vocabulary.

    Raises:
        ResultError: what is wrong with what it returned.
    """
    generator = torch.Generator().manual_seed(0)
    student_BN, teacher_BN = torch.randn(2, 3, 8, generator=generator).log_softmax(dim=-1).unbind()
    student_BN = student_BN.clone().requires_grad_()
    value = _called(function, student_BN, teacher_BN, by_columns=by_columns)
    if not value.isfinite().all():
        raise ResultError("gave NaN or infinity for two ordinary distributions")
    if not value.requires_grad:
        raise ResultError("gave a value that does not depend on the student's log-probs, so there is no gradient")
    (slope_BN,) = torch.autograd.grad(value.sum(), student_BN)
    if not slope_BN.isfinite().all():
        raise ResultError("has a gradient of NaN or infinity for two ordinary distributions")
    with torch.no_grad():
        alone = torch.cat([function(student_BN[b : b + 1], teacher_BN[b : b + 1]) for b in range(3)])
        if not torch.allclose(alone, value, atol=1e-5):
            raise ResultError("gave other values for the same rows one by one: each row must be compared by itself")
        if not by_columns:
            return
        halves = [function(student_BN[:, half], teacher_BN[:, half]) for half in (slice(0, 4), slice(4, 8))]
        if not torch.allclose(torch.cat(halves, dim=1), value, atol=1e-5):
            raise ResultError(
                "gave other terms for the same columns in two halves, and with tensor-parallel ranks each of them has "
                "a part of the vocabulary: a term must depend on its own column alone"
            )


def _called(
    function: DivergenceFn, student_BN: torch.Tensor, teacher_BN: torch.Tensor, *, by_columns: bool
) -> torch.Tensor:
    """What the function gave.

    Raises:
        ResultError: no tensor, or one of another shape than [B, N] or, unless it is to go ``by_columns``, [B].
    """
    value = function(student_BN, teacher_BN)
    if not isinstance(value, torch.Tensor):
        raise ResultError(f"gave {type(value).__name__}: a tensor is needed")
    rows, columns = student_BN.shape
    if by_columns and value.shape == (rows,):
        raise ResultError(
            f"gave one value per row, [{rows}], and with tensor-parallel ranks each of them has a part of the "
            f"vocabulary: give terms, [{rows}, {columns}], that add up to it over all columns"
        )
    if value.shape not in ((rows,), (rows, columns)):
        raise ResultError(
            f"gave shape {list(value.shape)} for log-probs [{rows}, {columns}]: give a value per row, [{rows}], or "
            f"terms, [{rows}, {columns}], that add up to it"
        )
    return value
