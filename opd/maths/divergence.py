"""Divergence between the student's and the teacher's next-token distributions, with its gradient worked out by hand.

`divergence` is for logits that exist; `opd.maths.head_divergence` never makes them all. Both go through
`divergence_and_grad`, which handles a chunk of rows: one exp per element and distribution, no autograd graph, and the
one choice between the CUDA kernel and plain torch. ``s`` is the student, ``t`` the teacher:

* reverse_kl: ``KL(s || t)``, the full-vocabulary form of the OPD penalty; mode seeking;
* forward_kl: ``KL(t || s)``, ordinary distillation; mass covering;
* gkd: ``m = beta t + (1 - beta) s``, ``beta KL(t || m) + (1 - beta) KL(s || m)`` (arXiv 2306.13649, eq. 1). beta = 0 is
  *defined* as forward_kl and beta = 1 as reverse_kl: the formula itself is 0 there, these are not its limits.

Values are nats, in float32 or the wider type of the student's logits. Temperature divides both sides' logits; the
gradient is that of the value as stated, without the T^2 that some authors multiply in.

Shapes: T or C rows (response tokens), V the vocabulary (V/tp of it per rank with ``group``), K kept ids.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from opd.maths import divergence_full, divergence_topk
from opd.maths.divergence_full import RowSums
from opd.maths.vocab_parallel import vocabulary_size, wide_dtype

KINDS = ("reverse_kl", "forward_kl", "gkd")
SUPPORTS = ("teacher", "student", "union")

# Rows are worked on in blocks, so that scratch is a few blocks and not a few chunks. On CPU a block of 4 MB a buffer
# stays in cache through its dozen passes, which takes half the time of a large chunk at once; elsewhere a block has to
# be large enough to fill the device.
_CPU_BLOCK = 2**20  # elements
_DEVICE_BLOCK = 2**24
_CHUNK = 256  # rows whose gradient the backward pass of `divergence` makes at a time


@dataclass(frozen=True, kw_only=True)
class ChunkDivergence:
    """Of C rows; nothing carries a gradient, and all ranks of a vocabulary-parallel group hold the same values."""

    value_C: torch.Tensor  # nats
    grad_CV: torch.Tensor | None  # d value / d student logits, this rank's columns
    student_entropy_C: torch.Tensor  # nats, of the whole vocabulary
    teacher_entropy_C: torch.Tensor  # nats, of the whole vocabulary; of the K + 1 buckets for a sparse teacher
    top1_agree_C: torch.Tensor  # 1.0 where both sides' likeliest token is the same
    tail_mass_C: torch.Tensor  # the student's mass outside the kept ids; 0 for the full vocabulary

    def gradient(self) -> torch.Tensor:
        """``grad_CV`` of a call that asked for it."""
        if self.grad_CV is None:
            raise ValueError("this divergence was computed with need_grad=False")
        return self.grad_CV


def divergence(
    student_logits_TV: torch.Tensor,
    teacher_logits_TV: torch.Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    support: str = "teacher",
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Divergence of each row, [T], differentiable in the student's logits; the teacher gets no gradient.

    ``top_k`` compares K tokens, chosen by ``support`` ("teacher", "student", or the "union" of both), and one bucket
    with each side's remaining mass: a lower bound of the full divergence. With ``group``, each rank passes its
    contiguous slice of the vocabulary, the result is equal on all ranks and the gradient stays local to the slice.
    Beyond its result the forward pass needs a few row blocks of memory, and so does the backward pass beyond the
    gradient: it recomputes both softmaxes.

    Raises:
        ValueError: unknown kind or support, beta outside [0, 1], temperature not above 0, top_k not in 1..V, or shapes
            that are not two equal [T, V].
    """
    check_options(kind=kind, beta=beta, temperature=temperature, top_k=top_k, support=support)
    check_logits(student_logits_TV, teacher_logits_TV, top_k, group)
    options = {"kind": kind, "beta": beta, "temperature": float(temperature), "top_k": top_k, "support": support}
    return _Divergence.apply(student_logits_TV, teacher_logits_TV.detach(), options | {"group": group})


def divergence_and_grad(
    student_logits_CV: torch.Tensor,
    teacher_logits_CV: torch.Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    support: str = "teacher",
    group: dist.ProcessGroup | None = None,
    need_grad: bool = True,
    out: torch.Tensor | None = None,
) -> ChunkDivergence:
    """Value, gradient and diagnostics of a chunk of rows; see `divergence` for the arguments and errors.

    ``out`` is written with the gradient instead of a new tensor (read ``grad_CV`` all the same: the CUDA kernel makes
    its own); it may be ``student_logits_CV`` itself where that has the result's type.

    Live [C, V] tensors beyond the arguments: the gradient, if needed and ``out`` is None. Scratch is 4 row blocks.
    """
    check_options(kind=kind, beta=beta, temperature=temperature, top_k=top_k, support=support)
    check_logits(student_logits_CV, teacher_logits_CV, top_k, group)
    kind = plain_kind(kind, beta)
    student_CV, teacher_CV = student_logits_CV.detach(), teacher_logits_CV.detach()
    kernel = _fused_kernel() if _kernel_can(student_CV, teacher_CV, top_k, group) else None
    if kernel is not None:
        return kernel(student_CV, teacher_CV, kind=kind, beta=beta, temperature=temperature, need_grad=need_grad)

    def block(rows: slice, grad_BV: torch.Tensor, scratch: list[torch.Tensor]) -> RowSums:
        shared: dict[str, Any] = {
            "kind": kind, "beta": beta, "temperature": temperature, "group": group,
            "grad_BV": grad_BV, "scratch": scratch, "need_grad": need_grad,
        }  # fmt: skip
        student_BV, teacher_BV = student_CV[rows], teacher_CV[rows]
        if top_k is None:
            return divergence_full.full_rows(student_BV, teacher_BV, **shared)
        return divergence_topk.topk_rows(student_BV, teacher_BV, top_k=top_k, support=support, **shared)

    buffers = divergence_full.SCRATCH if top_k is None else divergence_topk.SCRATCH
    return in_blocks(block, student_CV, buffers=buffers, need_grad=need_grad, out=out)


def sparse_divergence_and_grad(
    student_logits_CV: torch.Tensor,
    ids_CK: torch.Tensor,
    teacher_logprobs_CK: torch.Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    need_grad: bool = True,
    out: torch.Tensor | None = None,
) -> ChunkDivergence:
    """Top-k + tail divergence from a teacher that is known at some ids only, as a server gives it.

    ``ids_CK`` are ids of the whole vocabulary, distinct in each row, -1 where unused; ``teacher_logprobs_CK`` are the
    teacher's full-vocabulary log-softmax at the same ``temperature`` (ignored where the id is -1). Its tail is what
    they leave of 1. ``out`` as in `divergence_and_grad`.

    Raises:
        ValueError: as `divergence`; or an id that repeats or lies outside the vocabulary, or a log-prob above 0 or NaN.
    """
    check_options(kind=kind, beta=beta, temperature=temperature, top_k=None, support="teacher")
    _check_sparse(student_logits_CV, ids_CK, teacher_logprobs_CK, group)
    kind = plain_kind(kind, beta)
    student_CV, teacher_CK = student_logits_CV.detach(), teacher_logprobs_CK.detach()
    if not ids_CK.shape[1]:  # no row was scored: one unused place each, all mass in the tail, divergence 0
        ids_CK, teacher_CK = (torch.nn.functional.pad(x, (0, 1), value=-1) for x in (ids_CK, teacher_CK))

    def block(rows: slice, grad_BV: torch.Tensor, scratch: list[torch.Tensor]) -> RowSums:
        return divergence_topk.sparse_rows(
            student_CV[rows], ids_CK[rows], teacher_CK[rows], kind=kind, beta=beta,
            temperature=temperature, group=group, grad_BV=grad_BV, scratch=scratch, need_grad=need_grad,
        )  # fmt: skip

    return in_blocks(block, student_CV, buffers=divergence_topk.SPARSE_SCRATCH, need_grad=need_grad, out=out)


def plain_kind(kind: str, beta: float) -> str:
    """gkd at the ends of beta is one of the KLs, by definition."""
    if kind != "gkd":
        return kind
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta), "gkd")


def check_options(*, kind: str, beta: float, temperature: float, top_k: int | None, support: str) -> None:
    """Raises ValueError with the rule and the remedy for the first option that is out of range."""
    if kind not in KINDS:
        raise ValueError(
            f"kind={kind!r} is not a divergence: choose reverse_kl (KL(student || teacher)), forward_kl"
            " (KL(teacher || student)) or gkd (generalised Jensen-Shannon)"
        )
    if not 0 <= beta <= 1:
        raise ValueError(
            f"beta={beta} must be in [0, 1]: it is the teacher's weight in the mixture (0 forward_kl, 1 reverse_kl)"
        )
    if not (temperature > 0 and temperature != float("inf")):
        raise ValueError(f"temperature={temperature} must be above 0 and finite: it divides the logits; 1 leaves them")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(
            f"top_k={top_k!r} must be a whole number of tokens, 1 or more; None takes the whole vocabulary"
        )
    if support not in SUPPORTS:
        raise ValueError(f"support={support!r} must be one of {', '.join(SUPPORTS)}: whose likeliest tokens are kept")


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_TV: torch.Tensor, teacher_TV: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        ctx.save_for_backward(student_TV, teacher_TV)
        ctx.options = options
        return divergence_and_grad(student_TV, teacher_TV, need_grad=False, **options).value_C

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student_TV, teacher_TV = ctx.saved_tensors
        grad_TV = torch.empty_like(student_TV)
        for start in range(0, student_TV.shape[0], _CHUNK):
            rows = slice(start, start + _CHUNK)
            out = grad_TV[rows] if grad_TV.dtype == wide_dtype(student_TV) else None
            grad_CV = divergence_and_grad(student_TV[rows], teacher_TV[rows], out=out, **ctx.options).gradient()
            grad_CV.mul_(grad_T[rows, None])
            if grad_CV.data_ptr() != grad_TV[rows].data_ptr():
                grad_TV[rows] = grad_CV
        return grad_TV, None, None


def in_blocks(
    block: Callable[[slice, torch.Tensor, list[torch.Tensor]], RowSums],
    student_CV: torch.Tensor,
    *,
    buffers: int,
    need_grad: bool,
    out: torch.Tensor | None,
) -> ChunkDivergence:
    """Runs ``block(rows, gradient or a buffer in its place, scratch)`` over the rows."""
    rows, columns = student_CV.shape
    dtype = wide_dtype(student_CV)
    if not need_grad:
        out = None
    elif out is None:
        out = student_CV.new_empty((rows, columns), dtype=dtype)
    elements = _CPU_BLOCK if student_CV.device.type == "cpu" else _DEVICE_BLOCK
    size = max(1, min(rows, elements // max(columns, 1)))
    scratch = [student_CV.new_empty((size, columns), dtype=dtype) for _ in range(buffers + (not need_grad))]
    sums = []
    for start in range(0, rows, size):
        here = slice(start, min(start + size, rows))
        parts = [buffer[: here.stop - start] for buffer in scratch]
        sums.append(block(here, parts.pop() if out is None else out[here], parts))

    def gathered(field: str) -> torch.Tensor:
        return torch.cat([getattr(s, field) for s in sums]) if sums else student_CV.new_empty(0, dtype=dtype)

    return ChunkDivergence(
        value_C=gathered("value_B"),
        grad_CV=out,
        student_entropy_C=gathered("student_entropy_B"),
        teacher_entropy_C=gathered("teacher_entropy_B"),
        top1_agree_C=gathered("top1_agree_B"),
        tail_mass_C=gathered("tail_mass_B"),
    )


def _kernel_can(
    student_CV: torch.Tensor, teacher_CV: torch.Tensor, top_k: int | None, group: dist.ProcessGroup | None
) -> bool:
    if top_k is not None or group is not None or not (student_CV.is_cuda and teacher_CV.is_cuda):
        return False
    return all(x.dtype != torch.float64 and x.stride(-1) == 1 for x in (student_CV, teacher_CV))


@cache
def _fused_kernel() -> Callable[..., ChunkDivergence] | None:
    """The CUDA kernel, or None where triton is not installed; it imports this module, hence not at the top."""
    if importlib.util.find_spec("triton") is None:
        return None
    from opd.maths.divergence_triton import fused_divergence_and_grad

    return fused_divergence_and_grad


def check_logits(
    student_TV: torch.Tensor, teacher_TV: torch.Tensor, top_k: int | None, group: dist.ProcessGroup | None
) -> None:
    if student_TV.dim() != 2 or student_TV.shape != teacher_TV.shape or not student_TV.shape[1]:
        raise ValueError(
            f"student logits {tuple(student_TV.shape)} and teacher logits {tuple(teacher_TV.shape)} must both be"
            " [rows, vocabulary] of one shape: flatten batch and sequence, and cut or pad the teacher's columns to the"
            " student's vocabulary"
        )
    if top_k is not None and top_k > (size := vocabulary_size(student_TV.shape[1], group)):
        raise ValueError(
            f"top_k={top_k} must be at most the vocabulary, {size}: lower it, or use None for the whole vocabulary"
        )


def _check_sparse(
    student_CV: torch.Tensor, ids_CK: torch.Tensor, logprobs_CK: torch.Tensor, group: dist.ProcessGroup | None
) -> None:
    rows = student_CV.shape[0]
    if student_CV.dim() != 2 or ids_CK.dim() != 2 or ids_CK.shape != logprobs_CK.shape or ids_CK.shape[0] != rows:
        raise ValueError(
            f"student logits {tuple(student_CV.shape)}, ids {tuple(ids_CK.shape)} and teacher log-probs"
            f" {tuple(logprobs_CK.shape)} must be [rows, vocabulary], [rows, K] and [rows, K]: pad short rows with"
            " id -1"
        )
    if not ids_CK.numel():
        return
    size = vocabulary_size(student_CV.shape[1], group)
    if not -1 <= int(ids_CK.min()) <= int(ids_CK.max()) < size:
        raise ValueError(
            f"teacher ids span {int(ids_CK.min())}..{int(ids_CK.max())} but the student's vocabulary is 0..{size - 1}"
            " (-1 where unused): student and teacher need one tokenizer"
        )
    sorted_CK = ids_CK.sort(dim=-1).values
    if bool(((sorted_CK[:, 1:] == sorted_CK[:, :-1]) & (sorted_CK[:, 1:] >= 0)).any()):
        raise ValueError("teacher ids repeat within a row, so their mass would count twice: replace repeats with -1")
    # A log-prob of a near-certain token may round to just above 0.
    if not bool(((logprobs_CK < 1e-3) | (ids_CK < 0)).all()):
        raise ValueError("teacher log-probs must be at most 0 and not NaN: pass log softmax values, not logits")
