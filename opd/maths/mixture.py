"""The mixture ``q`` of two next-token distributions, proportional to ``student^(1 - a) teacher^a``, and its weight.

Shapes: B rows, V vocabulary; any leading shape does ([R, K, V] gives [R, K]). Logits are already divided by the
temperature; a column at -inf (or at the finfo.min of float32 or bfloat16) is truncated. Everything is in nats and
computed in float32, or float64 where an input is. With ``s`` and ``t`` the two distributions renormalised on their
common support, ``a`` is chosen by

    kl_symmetry   KL(q || s) = KL(q || t), the Chernoff point: of all q_a the one for which the larger of both is least
    ess_balance   sum q^2/s = sum q^2/t: samples of s, weighed by q/s, are worth as many of q as those of t are. Its
                  root is 1/2 for every pair (both sides are 1/(sum sqrt(s t))^2 there): q is the geometric mean
    ess_weights   sum s^2/q = sum t^2/q: samples of q, weighed by s/q, are worth as many of s as of t
    entropy       H(s) / (H(s) + H(t)): the surer model gets the more weight
    fixed         a number

Each root is unique in (0, 1) unless s = t, where every a gives the same q and 0.5 is returned.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from opd.maths.mixture_solvers import NOTHING, Solved, Workspace, solve_block

METHODS = ("kl_symmetry", "ess_balance", "ess_weights", "entropy", "fixed")
# Elements of one buffer of a block, for each thread: four of them fit in 1 MiB of second-level cache.
_ELEMENTS_A_THREAD = 1 << 16
_ELEMENTS_ON_A_DEVICE = 1 << 25  # no cache to fit; bounds the memory to four times 128 MiB


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """On the common support ``log q = (1 - a) student_logits + a teacher_logits - log_norm``, -inf elsewhere.

    Without overlap q is the student: a = 0 and ``log_norm`` is the student's own. A row that contains NaN or +inf, or
    in which the student has no token, has NaN for ``alpha`` and ``log_norm``.
    """

    alpha_B: torch.Tensor  # the teacher's weight, after ``scale``
    student_norm_B: torch.Tensor  # log-sum-exp of all the student's logits
    teacher_norm_B: torch.Tensor
    log_norm_B: torch.Tensor  # exact for this alpha, whatever the error of alpha itself
    overlap_B: torch.Tensor  # bool: the two supports have a token in common


def mix(
    student_logits_BV: torch.Tensor,
    teacher_logits_BV: torch.Tensor,
    *,
    method: str,
    fixed_alpha: float | None = None,
    scale: float = 1.0,
    compiled: bool = False,
) -> Mixed:
    """The mixture of each row, with the weight ``min(1, scale * a)``; rows do not touch each other.

    ``compiled``: through torch.compile, which halves the time of a large vocabulary on a CPU. It needs a C++ compiler,
    and half a minute at the first call of a method, again at the first one with a single row.

    Nothing waits for the device and nothing branches on a value. Errors of ``a`` are below 1e-5, with two exceptions:
    models so close (KL under 1e-4) that q hardly depends on it, and rows with log-ratios of hundreds of nats (1e-3).
    An entropy below 1e-38 counts as 0. At weights 0 and 1 q is the student or the teacher on the common support.

    Raises:
        ValueError: logits of different shapes, devices or without a column; unknown ``method``; ``fixed_alpha`` missing
            with "fixed", given with another method or outside [0, 1]; ``scale`` negative or not finite.
    """
    _check_logits(student_logits_BV, teacher_logits_BV)
    _check_weight(method, fixed_alpha, scale)
    if method == "ess_balance":
        method, fixed_alpha = "fixed", 0.5
    return _mix(
        student_logits_BV, teacher_logits_BV, method=method, alpha=fixed_alpha, scale=float(scale), compiled=compiled
    )


def solve_alpha(
    student_logits_BV: torch.Tensor,
    teacher_logits_BV: torch.Tensor,
    *,
    method: str,
    fixed_alpha: float | None = None,
) -> torch.Tensor:
    """[B] the teacher's weight. Raises as ``mix``."""
    return mix(student_logits_BV, teacher_logits_BV, method=method, fixed_alpha=fixed_alpha).alpha_B


def mixture_logprobs(
    student_logits_BV: torch.Tensor, teacher_logits_BV: torch.Tensor, alpha_B: torch.Tensor
) -> torch.Tensor:
    """[B, V] log q for given weights in [0, 1].

    Raises:
        ValueError: logits as in ``mix``, or weights that are not one per row.
    """
    _check_logits(student_logits_BV, teacher_logits_BV)
    if alpha_B.shape != student_logits_BV.shape[:-1]:
        raise ValueError(
            f"alpha has shape {tuple(alpha_B.shape)} and the logits {tuple(student_logits_BV.shape)}:"
            f" give one weight per row, shape {tuple(student_logits_BV.shape[:-1])}"
        )
    mixed = _mix(student_logits_BV, teacher_logits_BV, method="fixed", alpha=alpha_B, scale=1.0)
    return mixed_logprobs(mixed, student_logits_BV, teacher_logits_BV)


@torch.no_grad()
def mixed_logprobs(mixed: Mixed, student_logits_BV: torch.Tensor, teacher_logits_BV: torch.Tensor) -> torch.Tensor:
    """[B, V] log q, of the logits from which ``mixed`` was made."""
    shape, vocabulary = student_logits_BV.shape, student_logits_BV.shape[-1]
    student_BV, teacher_BV = student_logits_BV.reshape(-1, vocabulary), teacher_logits_BV.reshape(-1, vocabulary)
    alpha_B1, norm_B1, overlap_B1 = (
        x.reshape(-1, 1) for x in (mixed.alpha_B, mixed.log_norm_B, mixed.overlap_B.to(mixed.log_norm_B.dtype))
    )
    out_BV = torch.empty_like(student_BV, dtype=norm_B1.dtype)
    for rows in _blocks(student_BV):
        torch.sub(student_BV[rows], norm_B1[rows], out=out_BV[rows])
        _log_mixture_into(out_BV[rows], student_BV[rows], teacher_BV[rows], alpha_B1[rows], overlap_B1[rows])
    return out_BV.view(shape)


@torch.no_grad()
def mixed_logprobs_at(
    mixed: Mixed, student_logits_BV: torch.Tensor, teacher_logits_BV: torch.Tensor, ids_B: torch.Tensor
) -> torch.Tensor:
    """[B] log q of one token in each row, without the others."""
    student_B1 = student_logits_BV.gather(-1, ids_B[..., None])
    teacher_B1 = teacher_logits_BV.gather(-1, ids_B[..., None])
    overlap_B1 = mixed.overlap_B.to(mixed.log_norm_B.dtype)[..., None]
    out_B1 = student_B1 - mixed.log_norm_B[..., None]
    _log_mixture_into(out_B1, student_B1, teacher_B1, mixed.alpha_B[..., None], overlap_B1)
    return out_B1[..., 0]


def _log_mixture_into(
    out_RV: torch.Tensor,
    student_RV: torch.Tensor,
    teacher_RV: torch.Tensor,
    alpha_R1: torch.Tensor,
    overlap_R1: torch.Tensor,
) -> None:
    """From the student's logits less the normaliser, in place: nothing is rounded to the size of the raw logits."""
    dtype = out_RV.dtype
    lowest_RV = student_RV.to(dtype).clamp_min(NOTHING)  # a copy
    ratio_RV = teacher_RV.to(dtype).clamp_min(NOTHING).sub_(lowest_RV).mul_(overlap_R1)
    out_RV.clamp_min_(NOTHING).addcmul_(ratio_RV, alpha_R1)
    lowest_RV.add_(ratio_RV.clamp_max_(0))  # the lower of both logits; the student's without overlap
    # 0 where it is a logit, else -9e29 times a number that makes it -inf.
    penalty_RV = lowest_RV.clamp_max_(NOTHING / 10).sub_(NOTHING / 10)
    out_RV.add_(penalty_RV, alpha=torch.finfo(dtype).max / 1e20)


@torch.no_grad()
def _mix(
    student_logits_BV: torch.Tensor,
    teacher_logits_BV: torch.Tensor,
    *,
    method: str,
    alpha: float | torch.Tensor | None,
    scale: float,
    compiled: bool = False,
) -> Mixed:
    leading, vocabulary = student_logits_BV.shape[:-1], student_logits_BV.shape[-1]
    student_BV, teacher_BV = student_logits_BV.reshape(-1, vocabulary), teacher_logits_BV.reshape(-1, vocabulary)
    dtype = torch.promote_types(torch.promote_types(student_BV.dtype, teacher_BV.dtype), torch.float32)
    kernel = _kernel() if student_BV.is_cuda else None
    if kernel and kernel.takes(student_BV, teacher_BV, method):
        return _as_mixed(kernel.solve_rows(student_BV, teacher_BV, method=method, scale=scale), leading)
    alpha_B = alpha.reshape(-1).to(dtype) if isinstance(alpha, torch.Tensor) else None
    blocks = _blocks(student_BV)
    if compiled and method != "fixed":
        # The scale in a tensor: a number would be part of the compiled code.
        options = {"method": method, "alpha": None, "scale": torch.tensor(scale, dtype=dtype, device=student_BV.device)}
        parts = [_compiled_solver()(student_BV[rows], teacher_BV[rows], **options) for rows in blocks]
    else:
        workspace = Workspace(blocks[0].stop if blocks else 0, vocabulary, student_BV, dtype)
        parts = [
            solve_block(
                student_BV[rows],
                teacher_BV[rows],
                workspace,
                method=method,
                alpha=alpha if alpha_B is None else alpha_B[rows],
                scale=scale,
            )
            for rows in blocks
        ]
    if len(parts) == 1:
        solved = parts[0]
    elif parts:
        solved = Solved(*(torch.cat(column) for column in zip(*parts, strict=True)))
    else:
        empty = student_BV.new_empty(0, dtype=dtype)
        solved = Solved(empty, empty, empty, empty, empty.bool())
    return _as_mixed(solved, leading)


def _as_mixed(solved: Solved, leading: torch.Size) -> Mixed:
    return Mixed(**{f"{name}_B": column.reshape(leading) for name, column in solved._asdict().items()})


def _kernel() -> ModuleType | None:
    """The fused kernel; None without Triton, which not every build of torch brings along."""
    if importlib.util.find_spec("triton") is None:
        return None
    from opd.maths import mixture_triton

    return mixture_triton


@functools.cache
def _compiled_solver() -> Callable[..., Solved]:
    return torch.compile(_solve_in_fresh_buffers, dynamic=True, fullgraph=True)


def _solve_in_fresh_buffers(student_RV: torch.Tensor, teacher_RV: torch.Tensor, **options: Any) -> Solved:
    """For the compiler, which keeps most of the buffers in registers."""
    dtype = torch.promote_types(torch.promote_types(student_RV.dtype, teacher_RV.dtype), torch.float32)
    workspace = Workspace(student_RV.shape[0], student_RV.shape[1], student_RV, dtype)
    return solve_block(student_RV, teacher_RV, workspace, **options)


def _blocks(logits_BV: torch.Tensor) -> list[slice]:
    """Rows that are worked on together."""
    rows, vocabulary = logits_BV.shape
    on_cpu = logits_BV.device.type == "cpu"
    elements = _ELEMENTS_A_THREAD * torch.get_num_threads() if on_cpu else _ELEMENTS_ON_A_DEVICE
    step = max(1, elements // vocabulary)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _check_logits(student_BV: torch.Tensor, teacher_BV: torch.Tensor) -> None:
    if student_BV.shape != teacher_BV.shape or not student_BV.ndim or not student_BV.shape[-1]:
        raise ValueError(
            f"student logits {tuple(student_BV.shape)} and teacher logits {tuple(teacher_BV.shape)} must be alike,"
            " [..., vocabulary] with at least one column: cut both to the vocabulary that the models share"
        )
    if student_BV.device != teacher_BV.device:
        raise ValueError(
            f"student logits on {student_BV.device} and teacher logits on {teacher_BV.device}: move them to one device"
        )
    for name, logits in (("student", student_BV), ("teacher", teacher_BV)):
        if not logits.is_floating_point():
            raise ValueError(f"{name} logits of {logits.dtype} must be of a floating-point type")


def _check_weight(method: str, fixed_alpha: float | None, scale: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not a way to mix: choose one of {', '.join(METHODS)}")
    if method == "fixed" and fixed_alpha is None:
        raise ValueError("method='fixed' needs fixed_alpha, the teacher's weight in [0, 1]")
    if method != "fixed" and fixed_alpha is not None:
        raise ValueError(
            f"fixed_alpha={fixed_alpha} has no effect with method={method!r}, which finds the weight itself:"
            " drop it, or take method='fixed'"
        )
    if fixed_alpha is not None and not 0 <= fixed_alpha <= 1:
        raise ValueError(f"fixed_alpha={fixed_alpha} must be in [0, 1]: it is the teacher's weight")
    if not (scale >= 0 and math.isfinite(scale)):
        raise ValueError(f"scale={scale} must be a finite number of at least 0: the weight in use is min(1, scale * a)")
