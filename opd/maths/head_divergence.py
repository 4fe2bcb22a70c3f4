"""Output head and distribution loss in one: neither [R, V] logits nor their gradient ever exist.

The weight of every row is known before the loss is taken, so the gradient is made in the forward pass, chunk by chunk,
while the chunk's logits are at hand: no logits are kept for the backward pass and no matmul is done twice. The backward
pass only multiplies by the gradient of the scalar.

Shapes: R rows (response tokens), C rows of a chunk, H hidden size, V the vocabulary (V/tp per rank), K ids.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from opd.maths.divergence import (
    KINDS,
    ChunkDivergence,
    check_options,
    divergence_and_grad,
    sparse_divergence_and_grad,
)
from opd.maths.divergence_custom import DivergenceFn, custom_divergence_and_grad
from opd.maths.head import OutputHead, WeightGradient

DIAGNOSTICS = ("student_entropy", "teacher_entropy", "top1_agree", "tail_mass")

TeacherLogits = Callable[[torch.Tensor], torch.Tensor]
SparseTeacher = tuple[torch.Tensor, torch.Tensor]


def head_divergence(
    hidden_RH: torch.Tensor,
    head: OutputHead,
    teacher_logits: TeacherLogits | SparseTeacher,
    weights_R: torch.Tensor,
    *,
    kind: str | DivergenceFn,
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    support: str = "teacher",
    chunk: int = 256,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """``sum_r weights_r divergence_r`` over rows of hidden states; differentiable in them and in the head's weight.

    Args:
        teacher_logits: a function from row indices [C] to the teacher's logits [C, V] at those rows (this rank's
            slice), or a pair (ids [R, K], log-probs [R, K]) as `sparse_divergence_and_grad` takes it, for which
            ``top_k`` and ``support`` play no part.
        kind: one of `divergence.KINDS`, or a function of its own (`opd.maths.divergence_custom`), for which ``beta``
            and ``support`` play no part; it takes whole distributions.
        weights_R: weight of each row in the loss; no gradient. A row of weight 0 adds nothing, even if infinite.
        chunk: rows at a time. Live [C, V] tensors: the student's logits of a chunk, which turn into their gradient in
            place, and the teacher's of half a chunk. Under 256 rows a CPU's matmuls lose much of their speed.

    With ``head.group`` the gradient of ``hidden_RH`` is this rank's part only: its sum over the group is the caller's.

    Returns:
        (loss, divergence of each row [R], diagnostics by the names in `DIAGNOSTICS`, [R] each); only the loss carries
        a gradient, and one backward pass through it uses it up.

    Raises:
        ValueError: as `divergence` and `sparse_divergence_and_grad`; rows and weights that differ in number;
            chunk below 1; a function with ``top_k`` or with a teacher that is known at some ids only.
    """
    if callable(kind) and (top_k is not None or not callable(teacher_logits)):
        raise ValueError("a divergence of your own compares whole distributions: pass a teacher's logits, and no top_k")
    named = KINDS[0] if callable(kind) else kind
    check_options(kind=named, beta=beta, temperature=temperature, top_k=top_k, support=support)
    rows = hidden_RH.shape[0]
    if hidden_RH.dim() != 2 or weights_R.shape != (rows,):
        raise ValueError(
            f"hidden states {tuple(hidden_RH.shape)} and weights {tuple(weights_R.shape)} must be [rows, hidden] and"
            " [rows]: one weight per row"
        )
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1: it is the number of rows whose logits exist at a time")
    if not callable(teacher_logits) and teacher_logits[0].shape[:1] != (rows,):
        raise ValueError(
            f"{rows} rows of hidden states but teacher ids for {teacher_logits[0].shape[0]}: pass one per row"
        )
    options: dict[str, Any] = {"kind": kind, "beta": beta, "temperature": float(temperature)}
    if callable(kind):
        options = {"function": kind, "temperature": float(temperature)}
    elif callable(teacher_logits):
        options |= {"top_k": top_k, "support": support}
    loss, value_R, *diagnostics = _HeadDivergence.apply(
        hidden_RH, head.weight_VH, head, teacher_logits, weights_R.detach(), options, chunk, torch.is_grad_enabled()
    )
    return loss, value_R, dict(zip(DIAGNOSTICS, diagnostics, strict=True))


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: torch.Tensor,
        weight_VH: torch.Tensor,
        head: OutputHead,
        teacher: TeacherLogits | SparseTeacher,
        weights_R: torch.Tensor,
        options: dict[str, Any],
        chunk: int,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, ...]:
        need_hidden, need_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        grad_RH = torch.zeros_like(hidden_RH) if need_hidden else None
        total = WeightGradient(weight_VH) if need_weight else None
        # A rank may have no row to predict; one empty chunk gives its results their types.
        pieces = []
        for start in range(0, max(1, hidden_RH.shape[0]), chunk):
            rows = slice(start, start + chunk)
            per_row, grad_CV = _chunk(hidden_RH[rows], rows, head, teacher, options, need_hidden or need_weight)
            pieces.append(per_row)
            if grad_CV is not None:
                _accumulate(grad_CV, hidden_RH[rows], weights_R[rows], weight_VH, rows, grad_RH, total)
            del grad_CV  # it lies where the chunk's logits were: free it before the next ones are made
        value_R, *diagnostics = torch.cat(pieces, dim=1).unbind()
        loss = torch.where(weights_R == 0, 0.0, weights_R * value_R).sum()
        ctx.gradients = grad_RH, None if total is None else total.sum_VH
        ctx.weight_dtype = weight_VH.dtype
        ctx.mark_non_differentiable(value_R, *diagnostics)
        return loss, value_R, *diagnostics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a first backward pass used up the gradient of head_divergence: call it again")
        grad_RH, grad_VH = ctx.gradients
        ctx.gradients = None  # scaled in place: [V, H] is the largest tensor here, and a copy would double it
        if grad_loss.is_cuda or grad_loss != 1:  # on CPU looking is free, and saves a pass over [V, H]
            for gradient in (grad_RH, grad_VH):
                if gradient is not None:
                    gradient.mul_(grad_loss)
        if grad_VH is not None:
            grad_VH = grad_VH.to(ctx.weight_dtype)
        return grad_RH, grad_VH, None, None, None, None, None, None


def _chunk(
    hidden_CH: torch.Tensor,
    rows: slice,
    head: OutputHead,
    teacher: TeacherLogits | SparseTeacher,
    options: dict[str, Any],
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(what `_per_row` gives [5, C], gradient on the student's logits [C, V])."""
    logits_CV = head.logits(hidden_CH)
    # The gradient's two matmuls are best at many rows; the teacher's one suffers less from few, and saves memory so.
    half = max(1, -(-hidden_CH.shape[0] // 2))
    compare: Callable[..., ChunkDivergence] = divergence_and_grad
    if "function" in options:
        compare = partial(custom_divergence_and_grad, real_columns=head.real_columns(logits_CV.shape[1]))
    pieces = []
    for start in range(0, max(1, hidden_CH.shape[0]), half):
        student_CV = logits_CV[start : start + half]
        in_place = student_CV if need_grad else None
        shared = options | {"group": head.group, "need_grad": need_grad, "out": in_place}
        here = slice(rows.start + start, rows.start + start + student_CV.shape[0])
        if callable(teacher):
            index_C = torch.arange(here.start, here.stop, device=hidden_CH.device)
            piece = compare(student_CV, teacher(index_C), **shared)
        else:
            piece = sparse_divergence_and_grad(student_CV, teacher[0][here], teacher[1][here], **shared)
        if need_grad and piece.gradient().data_ptr() != student_CV.data_ptr():
            student_CV.copy_(piece.gradient())
        pieces.append(_per_row(piece))
        del piece
    return torch.cat(pieces, dim=1), logits_CV if need_grad else None


def _per_row(piece: ChunkDivergence) -> torch.Tensor:
    """Value, then the diagnostics in the order of `DIAGNOSTICS`, [5, C]."""
    return torch.stack([piece.value_C] + [getattr(piece, f"{name}_C") for name in DIAGNOSTICS])


def _accumulate(
    grad_CV: torch.Tensor,
    hidden_CH: torch.Tensor,
    weights_C: torch.Tensor,
    weight_VH: torch.Tensor,
    rows: slice,
    grad_RH: torch.Tensor | None,
    total: WeightGradient | None,
) -> None:
    """Adds a chunk to the gradients of the hidden states and of the weight."""
    if bool((weights_C == 0).any()):
        grad_CV[weights_C == 0] = 0  # it may be NaN, and 0 x NaN is NaN
    grad_CV = grad_CV.to(weight_VH.dtype)
    # The rows' weights go onto the small matrices: onto the gradient they would cost a pass over [C, V].
    weights_C1 = weights_C[:, None]
    if grad_RH is not None:
        grad_RH[rows] = (grad_CV @ weight_VH) * weights_C1
    if total is not None:
        total.add(grad_CV, (hidden_CH * weights_C1).to(weight_VH.dtype))
