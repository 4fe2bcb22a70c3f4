"""The mixture's weight and normaliser on CUDA: one program a row, every pass inside it, no tensor in between.

Shapes: B rows, V vocabulary, L lanes of a tile. The equations and the names are those of ``mixture_solvers``. Sums are
kept per lane, each relative to that lane's own maximum, and merged at the end of a pass. Both rows are read seven
times for kl_symmetry and 18 times for ess_weights: from the L2 cache, after the first time, where it holds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from opd.maths.mixture_solvers import ESS_STEPS, KL_STEPS, Solved

# 16 warps of 8 columns a thread: 32 KiB of loads in flight a program. Reasoned, not tuned on a device.
LANES = 4096
NUM_WARPS = 16
METHODS = {"kl_symmetry": 0, "ess_weights": 1}

_KL, _ESS = tl.constexpr(0), tl.constexpr(1)
_KL_STEPS, _ESS_STEPS = tl.constexpr(KL_STEPS), tl.constexpr(ESS_STEPS)
_NOTHING = tl.constexpr(-1e30)
_SLACK = tl.constexpr(1e-5)
_EPSILON = tl.constexpr(8 * 2.0**-23)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(student_logits_BV: torch.Tensor, teacher_logits_BV: torch.Tensor, method: str) -> bool:
    """Whether the kernel is made for these: CUDA, float32 or shorter, and a method that has an equation to solve."""
    return method in METHODS and all(x.is_cuda and x.dtype in _DTYPES for x in (student_logits_BV, teacher_logits_BV))


def solve_rows(
    student_logits_BV: torch.Tensor,
    teacher_logits_BV: torch.Tensor,
    *,
    method: str,
    scale: float,
    lanes: int = LANES,
) -> Solved:
    """[B] each, float32. Rows may lie anywhere; columns are made neighbours.

    Raises:
        ValueError: a method, type or device that ``takes`` refuses, or shapes that differ.
    """
    if method not in METHODS or student_logits_BV.ndim != 2 or student_logits_BV.shape != teacher_logits_BV.shape:
        raise ValueError(
            f"method={method!r} on {tuple(student_logits_BV.shape)} and {tuple(teacher_logits_BV.shape)}:"
            f" the kernel takes {' and '.join(METHODS)} and two alike [rows, vocabulary]"
        )
    for name, logits in (("student", student_logits_BV), ("teacher", teacher_logits_BV)):
        if logits.dtype not in _DTYPES or not (logits.is_cuda or _INTERPRETED.value):
            raise ValueError(
                f"{name} logits of {logits.dtype} on {logits.device}: the kernel takes float32, bfloat16 and float16"
                " on CUDA"
            )
    student_BV, teacher_BV = (x if x.stride(1) == 1 else x.contiguous() for x in (student_logits_BV, teacher_logits_BV))
    rows, vocabulary = student_BV.shape
    out_5B = torch.empty(5, rows, dtype=torch.float32, device=student_BV.device)
    if rows:
        with torch.cuda.device_of(student_BV):  # Triton launches on the current device, not on the tensors'
            _mix_rows[(rows,)](
                student_BV,
                teacher_BV,
                out_5B,
                rows,
                vocabulary,
                student_BV.stride(0),
                teacher_BV.stride(0),
                float(scale),
                METHOD=METHODS[method],
                LANES=lanes,
                num_warps=NUM_WARPS,
            )
    alpha_B, student_norm_B, teacher_norm_B, log_norm_B, overlap_B = out_5B.unbind(0)
    return Solved(alpha_B, student_norm_B, teacher_norm_B, log_norm_B, overlap_B > 0)


@triton.jit(do_not_specialize=["rows", "scale"])
def _mix_rows(
    student_ptr,
    teacher_ptr,
    out_ptr,
    rows,
    vocabulary,
    student_stride,
    teacher_stride,
    scale,
    METHOD: tl.constexpr,
    LANES: tl.constexpr,
):
    """out[0..4, row]: alpha, the student's norm, the teacher's, the mixture's, 1.0 where the supports overlap."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride

    s_top, t_top, s_common, t_common = _tops(student_ptr, teacher_ptr, vocabulary, LANES)
    s_sum, t_sum, s_inside, t_inside = _totals(
        student_ptr, teacher_ptr, vocabulary, s_top, t_top, s_common, t_common, LANES
    )
    s_norm, t_norm = s_top.to(tl.float64) + tl.log(s_sum), t_top.to(tl.float64) + tl.log(t_sum)
    # Of the common support, relative to the tops: float64 because models that are all but certain differ in 1e-8.
    base = (s_common - s_top).to(tl.float64) + tl.log(s_inside)
    shift = ((t_common - t_top).to(tl.float64) + tl.log(t_inside) - base).to(tl.float32)
    rounding = (tl.abs(s_common - s_top) + tl.abs(t_common - t_top) + 1) * _EPSILON

    alpha = tl.full((), 0.5, tl.float32)
    low = tl.full((), 0.0, tl.float32)
    high = tl.full((), 1.0, tl.float32)
    spread = tl.full((), 0.0, tl.float64)
    if METHOD == _KL:
        for step in range(_KL_STEPS):
            square, above, value, slope, curve = _symmetry(
                student_ptr, teacher_ptr, vocabulary, s_top, t_top, shift, alpha, LANES
            )
            spread = tl.where(step == 0, square, spread)
            alpha, low, high = _narrow(alpha, low, high, above, value, slope, curve)
    else:
        _, mean, variance = _cumulants(student_ptr, teacher_ptr, vocabulary, s_top, t_top, shift, alpha, LANES)
        spread = variance + mean * mean
        for _ in range(_ESS_STEPS):
            s_k, s_mean, s_var = _cumulants(student_ptr, teacher_ptr, vocabulary, s_top, t_top, shift, -alpha, LANES)
            t_k, t_mean, t_var = _cumulants(student_ptr, teacher_ptr, vocabulary, s_top, t_top, shift, 2 - alpha, LANES)
            s_k, t_k = s_k - base, t_k - base
            up, down = -s_mean / s_k, -t_mean / t_k
            curve = (s_var / s_k - up * up) - (t_var / t_k - down * down)
            alpha, low, high = _narrow(alpha, low, high, s_k > t_k, tl.log(s_k / t_k), up - down, curve)
    alpha = tl.where(spread <= rounding * rounding, 0.5, alpha)
    alpha = tl.minimum(alpha * scale, 1.0)

    k, _, _ = _cumulants(student_ptr, teacher_ptr, vocabulary, s_top, t_top, shift, alpha, LANES)
    weight = alpha.to(tl.float64)
    between = t_top.to(tl.float64) - s_top.to(tl.float64) + shift.to(tl.float64)
    log_norm = s_top.to(tl.float64) + weight * between + k
    # A row with NaN or +inf, or without a token of the student's, has no mixture.
    valid = (s_norm == s_norm) & (t_norm == t_norm) & (s_top > _NOTHING)
    overlap = s_common > _NOTHING
    nan = float("nan")
    tl.store(out_ptr + row, tl.where(valid, tl.where(overlap, alpha, 0.0), nan))
    tl.store(out_ptr + rows + row, s_norm.to(tl.float32))
    tl.store(out_ptr + 2 * rows + row, tl.where(t_top > _NOTHING, t_norm, float("-inf")).to(tl.float32))
    tl.store(out_ptr + 3 * rows + row, tl.where(valid, tl.where(overlap, log_norm, s_norm), nan).to(tl.float32))
    tl.store(out_ptr + 4 * rows + row, (overlap & valid).to(tl.float32))


@triton.jit
def _narrow(alpha, low, high, above, value, slope, curve):
    """A step of Halley's where it stays in the bracket, else halve it; NaN halves."""
    high = tl.where(above, alpha, high)
    low = tl.where(above, low, alpha)
    new = (alpha - value * slope / (slope * slope - 0.5 * value * curve)).to(tl.float32)
    inside = (new >= low - _SLACK) & (new <= high + _SLACK)
    clamped = tl.minimum(tl.maximum(new, 0.0), 1.0)
    return tl.where(inside, clamped, 0.5 * (low + high)), low, high


@triton.jit
def _tops(student_ptr, teacher_ptr, vocabulary, LANES: tl.constexpr):
    """Largest logits: the student's, the teacher's, and both on the common support; NaN if there is one."""
    s_top = tl.full((LANES,), _NOTHING, tl.float32)
    t_top = tl.full((LANES,), _NOTHING, tl.float32)
    s_common = tl.full((LANES,), _NOTHING, tl.float32)
    t_common = tl.full((LANES,), _NOTHING, tl.float32)
    for start in range(0, vocabulary, LANES):
        s, t, common = _load(student_ptr, teacher_ptr, start, vocabulary, LANES)
        s_top, t_top = tl.maximum(s_top, s), tl.maximum(t_top, t)
        s_common = tl.maximum(s_common, tl.where(common, s, _NOTHING))
        t_common = tl.maximum(t_common, tl.where(common, t, _NOTHING))
    return tl.max(s_top, 0), tl.max(t_top, 0), tl.max(s_common, 0), tl.max(t_common, 0)


@triton.jit
def _totals(student_ptr, teacher_ptr, vocabulary, s_top, t_top, s_common, t_common, LANES: tl.constexpr):
    """Sums of exponentials below the four tops, float64."""
    s_sum = tl.zeros((LANES,), tl.float64)
    t_sum = tl.zeros((LANES,), tl.float64)
    s_inside = tl.zeros((LANES,), tl.float64)
    t_inside = tl.zeros((LANES,), tl.float64)
    for start in range(0, vocabulary, LANES):
        s, t, common = _load(student_ptr, teacher_ptr, start, vocabulary, LANES)
        s_sum += tl.where(s > _NOTHING, tl.exp(s - s_top), tl.where(s == s, 0.0, s)).to(tl.float64)
        t_sum += tl.where(t > _NOTHING, tl.exp(t - t_top), tl.where(t == t, 0.0, t)).to(tl.float64)
        s_inside += tl.where(common, tl.exp(s - s_common), 0.0).to(tl.float64)
        t_inside += tl.where(common, tl.exp(t - t_common), 0.0).to(tl.float64)
    return tl.sum(s_sum, 0), tl.sum(t_sum, 0), tl.sum(s_inside, 0), tl.sum(t_inside, 0)


@triton.jit
def _symmetry(student_ptr, teacher_ptr, vocabulary, s_top, t_top, shift, exponent, LANES: tl.constexpr):
    """At a weight: E[L^2], whether E[L] > 0, and log of the sum of q L where L > 0 over that of q |L| where it is
    below, with its first two derivatives."""
    peak = tl.full((LANES,), 10 * _NOTHING, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    above1 = tl.zeros((LANES,), tl.float32)
    above2 = tl.zeros((LANES,), tl.float32)
    above3 = tl.zeros((LANES,), tl.float32)
    below1 = tl.zeros((LANES,), tl.float32)
    below2 = tl.zeros((LANES,), tl.float32)
    below3 = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocabulary, LANES):
        log_s, ratio = _log_pair(student_ptr, teacher_ptr, start, vocabulary, s_top, t_top, shift, LANES)
        log_weight = log_s + exponent * ratio
        new = tl.maximum(peak, log_weight)
        decay, weight = tl.exp(peak - new), tl.exp(log_weight - new)
        peak = new
        up, down = tl.maximum(ratio, 0.0), tl.maximum(-ratio, 0.0)
        total = total * decay + weight
        weight_up, weight_down = weight * up, weight * down
        above1, below1 = above1 * decay + weight_up, below1 * decay + weight_down
        weight_up, weight_down = weight_up * up, weight_down * down
        above2, below2 = above2 * decay + weight_up, below2 * decay + weight_down
        above3, below3 = above3 * decay + weight_up * up, below3 * decay + weight_down * down
    decay = tl.exp(peak - tl.max(peak, 0))
    a1, b1 = tl.sum(above1 * decay, 0), tl.sum(below1 * decay, 0)
    a2, b2 = tl.sum(above2 * decay, 0), tl.sum(below2 * decay, 0)
    a3, b3 = tl.sum(above3 * decay, 0), tl.sum(below3 * decay, 0)
    rise, fall = a2 / a1, b2 / b1
    curve = (a3 / a1 - rise * rise) - (b3 / b1 - fall * fall)
    square = ((a2 + b2) / tl.sum(total * decay, 0)).to(tl.float64)
    return square, a1 > b1, tl.log(a1 / b1), rise + fall, curve


@triton.jit
def _cumulants(student_ptr, teacher_ptr, vocabulary, s_top, t_top, shift, exponent, LANES: tl.constexpr):
    """(K up to ``base``, mean and variance of L) of weights ``s e^(exponent L)``, float64."""
    peak = tl.full((LANES,), 10 * _NOTHING, tl.float32)
    total = tl.zeros((LANES,), tl.float64)
    first = tl.zeros((LANES,), tl.float64)
    second = tl.zeros((LANES,), tl.float64)
    for start in range(0, vocabulary, LANES):
        log_s, ratio = _log_pair(student_ptr, teacher_ptr, start, vocabulary, s_top, t_top, shift, LANES)
        log_weight = log_s + exponent * ratio
        new = tl.maximum(peak, log_weight)
        decay, weight = tl.exp(peak - new).to(tl.float64), tl.exp(log_weight - new)
        peak = new
        total = total * decay + weight.to(tl.float64)
        first = first * decay + (weight * ratio).to(tl.float64)
        second = second * decay + (weight * ratio * ratio).to(tl.float64)
    top = tl.max(peak, 0)
    decay = tl.exp(peak - top).to(tl.float64)
    all_ = tl.sum(total * decay, 0)
    mean = tl.sum(first * decay, 0) / all_
    return top.to(tl.float64) + tl.log(all_), mean, tl.sum(second * decay, 0) / all_ - mean * mean


@triton.jit
def _log_pair(student_ptr, teacher_ptr, start, vocabulary, s_top, t_top, shift, LANES: tl.constexpr):
    """(log s up to a constant, log t - log s); no weight and ratio 0 off the common support."""
    s, t, common = _load(student_ptr, teacher_ptr, start, vocabulary, LANES)
    log_s = s - s_top
    return tl.where(common, log_s, 10 * _NOTHING), tl.where(common, (t - t_top) - log_s - shift, 0.0)


@triton.jit
def _load(student_ptr, teacher_ptr, start, vocabulary, LANES: tl.constexpr):
    columns = start + tl.arange(0, LANES)
    inside = columns < vocabulary
    s = tl.load(student_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    t = tl.load(teacher_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    return s, t, (s > _NOTHING) & (t > _NOTHING)
