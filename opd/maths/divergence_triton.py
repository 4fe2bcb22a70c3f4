"""Divergence of two rows of logits and its gradient, fused for CUDA: one program a row, no probabilities in memory.

Shapes: C rows of a chunk, V the whole vocabulary; inside the kernel, L lanes of K neighbouring columns make a tile.
Everything is computed in float32 and in nats; ``s`` and ``t`` are the student's and the teacher's softmax.

Reads of both rows of logits, besides one write of the gradient where it is asked for:

    =========== ===== ========== ==================================================================
    kind        value + gradient why
    =========== ===== ========== ==================================================================
    reverse_kl  1     2          sum s (log s - log t) is a weighted sum over the normaliser: online
    forward_kl  1     2          likewise, sum t (log t - log s)
    gkd         2     3          log m mixes both normalisers; the gradient needs sum s log(s / m)
    =========== ===== ========== ==================================================================

The online softmax is kept per lane. A thread owns whole lanes, so no tile needs a reduction across threads, which
would cost a barrier each; the lanes are merged once, at the end of a row. Every second pass walks backwards: it starts
with the columns read last, the likeliest to be in L2 still.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from opd.maths.divergence import ChunkDivergence, check_options, plain_kind

# 1,024 lanes of 16 bytes over 16 warps: two vectors of each model a thread, so 32 KiB in flight a program. One program
# on each of an H200's 132 multiprocessors then covers its memory (4.8 TB/s x 0.7 us = 25 KiB each); at 64 registers a
# thread two fit, so 264 rows run at once. Reasoned from latency and the compiled code, not tuned on a device.
LANES = 1024
NUM_WARPS = 16
_VECTOR_BYTES = 16

_REVERSE, _FORWARD, _GKD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_KINDS = {"reverse_kl": _REVERSE.value, "forward_kl": _FORWARD.value, "gkd": _GKD.value}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Stands for -inf and for the finfo.min of padding: exp gives exactly 0, yet 0 * log-prob is 0 and not NaN.
_NOTHING = tl.constexpr(-1e30)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_UNBOUNDED = 1e20  # nats; only mass where the other model has none gets there


def fused_divergence_and_grad(
    student_logits_CV: torch.Tensor,
    teacher_logits_CV: torch.Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float,
    need_grad: bool,
    grad_dtype: torch.dtype = torch.float32,
    lanes: int = LANES,
) -> ChunkDivergence:
    """Per row, over the full vocabulary, at ``temperature`` on both sides; the inputs are left as they are.

    ``kind``: ``reverse_kl`` KL(s || t), ``forward_kl`` KL(t || s), or ``gkd`` beta KL(t || m) + (1 - beta) KL(s || m)
    with m = beta t + (1 - beta) s; gkd's beta 0 and 1 are forward_kl and reverse_kl by definition. Columns at -inf
    or finfo.min in both models add nothing and get gradient 0; mass of one model where the other has none makes its
    KL infinite. ``grad_dtype`` may be the student's, to halve the gradient's memory. ``lanes``, a power of two, times
    16 bytes is the width of a tile. ``top1_agree_C`` is 1.0 where one column holds both maxima. Vector loads need a
    vocabulary and row strides that are multiples of 16 (a padded vocabulary is); others are slower, not wrong.

    Raises:
        ValueError: shapes, devices or types that do not fit, ``temperature`` or ``beta`` out of range, unknown kind.
    """
    check_options(kind=kind, beta=beta, temperature=temperature, top_k=None, support="teacher")
    _check_logits(student_logits_CV, teacher_logits_CV)
    student_CV, teacher_CV = _unit_columns(student_logits_CV), _unit_columns(teacher_logits_CV)
    rows, vocabulary = student_CV.shape
    device = student_CV.device
    out_4C = torch.empty(4, rows, dtype=torch.float32, device=device)
    grad_CV = torch.empty(rows, vocabulary, dtype=grad_dtype, device=device) if need_grad else None
    vector = _columns_a_load(student_CV, teacher_CV)
    if rows:
        with torch.cuda.device_of(student_CV):  # Triton launches on the current device, not on the tensors'
            _divergence_rows[(rows,)](
                student_CV,
                teacher_CV,
                out_4C if grad_CV is None else grad_CV,
                out_4C,
                rows,
                vocabulary,
                student_CV.stride(0),
                teacher_CV.stride(0),
                1 / temperature,
                float(beta),
                KIND=_KINDS[plain_kind(kind, beta)],
                NEED_GRAD=need_grad,
                LANES=lanes if vector > 1 else 2 * lanes,
                VECTOR=vector,
                GRAD_VECTOR=min(vector, _VECTOR_BYTES // grad_dtype.itemsize),
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    value_C, student_entropy_C, teacher_entropy_C, top1_agree_C = out_4C.unbind(0)
    return ChunkDivergence(
        value_C=value_C.masked_fill_(value_C > _UNBOUNDED, float("inf")),
        grad_CV=grad_CV,
        student_entropy_C=student_entropy_C,
        teacher_entropy_C=teacher_entropy_C,
        top1_agree_C=top1_agree_C,
        tail_mass_C=torch.zeros_like(value_C),
    )


def _check_logits(student_CV: torch.Tensor, teacher_CV: torch.Tensor) -> None:
    if student_CV.ndim != 2 or student_CV.shape != teacher_CV.shape or not student_CV.shape[1]:
        raise ValueError(
            f"student logits {tuple(student_CV.shape)} and teacher logits {tuple(teacher_CV.shape)}"
            " must be [rows, vocabulary], both alike, with at least one column"
        )
    for name, logits in (("student", student_CV), ("teacher", teacher_CV)):
        if logits.dtype not in _DTYPES:
            raise ValueError(f"{name} logits of {logits.dtype}: the kernel takes float32, bfloat16 and float16")
        if not (logits.is_cuda or _INTERPRETED.value) or logits.device != student_CV.device:
            raise ValueError(f"{name} logits on {logits.device}: the kernel needs both on one CUDA device")


def _unit_columns(logits_CV: torch.Tensor) -> torch.Tensor:
    """Rows may lie anywhere; the columns of a row must be neighbours, for vector loads."""
    return logits_CV if logits_CV.stride(1) == 1 else logits_CV.contiguous()


def _columns_a_load(*logits_CV: torch.Tensor) -> int:
    """As many as 16 bytes hold; one if any row or its end is not where the compiler can rely on such loads."""
    aligned = all(
        x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % _VECTOR_BYTES == 0 for x in logits_CV
    )
    return _VECTOR_BYTES // max(x.element_size() for x in logits_CV) if aligned else 1


@triton.jit(do_not_specialize=["rows"])
def _divergence_rows(
    student_ptr,
    teacher_ptr,
    grad_ptr,
    out_ptr,
    rows,
    vocabulary,
    student_stride,
    teacher_stride,
    scale,
    beta,
    KIND: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr,
):
    """out[0..3, row]: value, student entropy, teacher entropy, 1.0 where one column holds both maxima; grad[row, :]."""
    row = tl.program_id(0).to(tl.int64)  # row x stride passes 2**31 from 14,135 rows of 151,936 on
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    grad_ptr += row * vocabulary

    s_top, s_log, t_top, t_log, s_entropy, t_entropy, kl, agree = _softmax_pass(
        student_ptr, teacher_ptr, vocabulary, scale, KIND, LANES, VECTOR
    )
    value = kl
    if KIND == _GKD:
        t_kl, s_kl = _mixture_pass(
            student_ptr, teacher_ptr, vocabulary, scale, beta, s_top, s_log, t_top, t_log, LANES, VECTOR
        )
        value = beta * t_kl + (1 - beta) * s_kl
        kl = s_kl
    tl.store(out_ptr + row, value)
    tl.store(out_ptr + rows + row, s_entropy)
    tl.store(out_ptr + 2 * rows + row, t_entropy)
    tl.store(out_ptr + 3 * rows + row, agree)
    if NEED_GRAD:
        # Lanes of one store's width: from wider ones each tile would be transposed through shared memory.
        _gradient_pass(
            student_ptr,
            teacher_ptr,
            grad_ptr,
            vocabulary,
            scale,
            beta,
            s_top,
            s_log,
            t_top,
            t_log,
            kl,
            KIND,
            LANES * VECTOR // GRAD_VECTOR,
            GRAD_VECTOR,
        )


@triton.jit
def _softmax_pass(
    student_ptr, teacher_ptr, vocabulary, scale, KIND: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """Normalisers (maximum, log sum), entropies, the KL of a one-pass kind, and whether one column holds both maxima.

    Per lane: ``peak`` the running maximum, ``mass`` = sum e^(x - peak), ``moment`` = sum e^(x - peak) (x - peak), and
    ``cross`` = sum e^(x - peak) (y - peak of y), x being the model that the KL averages over. Differences from the
    peaks keep every sum of the size of an entropy, whatever constant the logits carry.
    """
    s_peak = tl.full((LANES,), _NOTHING, tl.float32)
    t_peak = tl.full((LANES,), _NOTHING, tl.float32)
    s_mass = tl.zeros((LANES,), tl.float32)
    t_mass = tl.zeros((LANES,), tl.float32)
    s_moment = tl.zeros((LANES,), tl.float32)
    t_moment = tl.zeros((LANES,), tl.float32)
    cross = tl.zeros((LANES,), tl.float32)
    both = tl.full((LANES,), 2 * _NOTHING, tl.float32)
    for start in range(0, vocabulary, LANES * VECTOR):
        x = _load_tile(student_ptr, start, vocabulary, scale, LANES, VECTOR)
        y = _load_tile(teacher_ptr, start, vocabulary, scale, LANES, VECTOR)
        both = tl.maximum(both, tl.max(x + y, axis=1))
        s_new = tl.maximum(s_peak, tl.max(x, axis=1))
        t_new = tl.maximum(t_peak, tl.max(y, axis=1))
        s_fall, t_fall = s_peak - s_new, t_peak - t_new
        s_decay, t_decay = _exp(s_fall), _exp(t_fall)
        dx, dy = x - s_new[:, None], y - t_new[:, None]
        px, py = _exp(dx), _exp(dy)
        if KIND == _REVERSE:
            cross = (cross + t_fall * s_mass) * s_decay + tl.sum(px * dy, axis=1)
        if KIND == _FORWARD:
            cross = (cross + s_fall * t_mass) * t_decay + tl.sum(py * dx, axis=1)
        s_moment = (s_moment + s_fall * s_mass) * s_decay + tl.sum(px * dx, axis=1)
        t_moment = (t_moment + t_fall * t_mass) * t_decay + tl.sum(py * dy, axis=1)
        s_mass = s_mass * s_decay + tl.sum(px, axis=1)
        t_mass = t_mass * t_decay + tl.sum(py, axis=1)
        s_peak, t_peak = s_new, t_new

    s_top, t_top = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    s_fall, t_fall = s_peak - s_top, t_peak - t_top
    s_weight, t_weight = _exp(s_fall), _exp(t_fall)
    s_sum, t_sum = tl.sum(s_weight * s_mass, axis=0), tl.sum(t_weight * t_mass, axis=0)
    s_log, t_log = tl.log(s_sum), tl.log(t_sum)
    s_mean = tl.sum(s_weight * (s_moment + s_fall * s_mass), axis=0) / s_sum
    t_mean = tl.sum(t_weight * (t_moment + t_fall * t_mass), axis=0) / t_sum
    kl = 0.0
    if KIND == _REVERSE:
        kl = (s_mean - s_log) - (tl.sum(s_weight * (cross + t_fall * s_mass), axis=0) / s_sum - t_log)
    if KIND == _FORWARD:
        kl = (t_mean - t_log) - (tl.sum(t_weight * (cross + s_fall * t_mass), axis=0) / t_sum - s_log)
    # The sum of the logits reaches the sum of the maxima only in a column that holds both.
    agree = (tl.max(both, axis=0) >= s_top + t_top).to(tl.float32)
    return s_top, s_log, t_top, t_log, s_log - s_mean, t_log - t_mean, kl, agree


@triton.jit
def _mixture_pass(
    student_ptr,
    teacher_ptr,
    vocabulary,
    scale,
    beta,
    s_top,
    s_log,
    t_top,
    t_log,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """KL(t || m) and KL(s || m), walking backwards."""
    t_kl = tl.zeros((LANES,), tl.float32)
    s_kl = tl.zeros((LANES,), tl.float32)
    tiles = tl.cdiv(vocabulary, LANES * VECTOR)
    for i in range(0, tiles):
        start = (tiles - 1 - i) * (LANES * VECTOR)
        log_s = _log_softmax(student_ptr, start, vocabulary, scale, s_top, s_log, LANES, VECTOR)
        log_t = _log_softmax(teacher_ptr, start, vocabulary, scale, t_top, t_log, LANES, VECTOR)
        s, t, log_s_m, log_t_m = _against_mixture(log_s, log_t, beta)
        t_kl += tl.sum(t * log_t_m, axis=1)
        s_kl += tl.sum(s * log_s_m, axis=1)
    return tl.sum(t_kl, axis=0), tl.sum(s_kl, axis=0)


@triton.jit
def _gradient_pass(
    student_ptr,
    teacher_ptr,
    grad_ptr,
    vocabulary,
    scale,
    beta,
    s_top,
    s_log,
    t_top,
    t_log,
    kl,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """d value / d student logit. ``kl``: KL(s || t) for reverse_kl, KL(s || m) for gkd, unused for forward_kl."""
    tiles = tl.cdiv(vocabulary, LANES * VECTOR)
    for i in range(0, tiles):
        # The pass before ended at the other end of the row: forwards after the mixture's backward pass.
        start = (i if KIND == _GKD else tiles - 1 - i) * (LANES * VECTOR)
        log_s = _log_softmax(student_ptr, start, vocabulary, scale, s_top, s_log, LANES, VECTOR)
        log_t = _log_softmax(teacher_ptr, start, vocabulary, scale, t_top, t_log, LANES, VECTOR)
        if KIND == _REVERSE:
            grad = _exp(log_s) * ((log_s - log_t) - kl) * scale
        elif KIND == _FORWARD:
            grad = (_exp(log_s) - _exp(log_t)) * scale
        else:
            s, t, log_s_m, log_t_m = _against_mixture(log_s, log_t, beta)
            grad = s * (log_s_m - kl) * ((1 - beta) * scale)
        columns = _columns(start, LANES, VECTOR)
        tl.store(grad_ptr + columns, grad, mask=columns < vocabulary)


@triton.jit
def _columns(start, LANES: tl.constexpr, VECTOR: tl.constexpr):
    return start + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _load_tile(row_ptr, start, vocabulary, scale, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Logits over the temperature; columns past the end and masked ones are ``_NOTHING``, NaN stays NaN."""
    columns = _columns(start, LANES, VECTOR)
    logits = tl.load(row_ptr + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
    return tl.maximum(logits * scale, _NOTHING, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _log_softmax(row_ptr, start, vocabulary, scale, top, log_sum, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Less the maximum first: a normaliser of 50 would round every log-prob to 4e-6."""
    return (_load_tile(row_ptr, start, vocabulary, scale, LANES, VECTOR) - top) - log_sum


@triton.jit
def _against_mixture(log_s, log_t, beta):
    """s, t, log(s / m), log(t / m) from two exponentials and a logarithm; nothing overflows or cancels."""
    gap = log_t - log_s
    teacher_higher = gap > 0
    ratio = _exp(-tl.abs(gap))
    higher = _exp(tl.maximum(log_s, log_t))
    lower = higher * ratio
    mixed = tl.where(teacher_higher, beta + (1 - beta) * ratio, (1 - beta) + beta * ratio)  # m over the higher of both
    log_m = _log(mixed)
    s = tl.where(teacher_higher, lower, higher)
    t = tl.where(teacher_higher, higher, lower)
    return s, t, -tl.maximum(gap, 0.0) - log_m, tl.minimum(gap, 0.0) - log_m


@triton.jit
def _exp(x):
    """The device's own, 2 ulp, results below 1e-38 flushed to 0: keeping those costs three instructions a column."""
    return tl.exp(x) if _INTERPRETED else libdevice.fast_expf(x)


@triton.jit
def _log(x):
    """The device's own, off by 2e-7 near 1, about what rounding the argument costs; a better one is 25 instructions."""
    return tl.log(x) if _INTERPRETED else libdevice.fast_logf(x)
