"""The mixture's equations on a block of rows small enough for the processor's cache: one elementwise pass after another
over the same few buffers, no host synchronisation, a fixed number of passes.

Shapes: R rows of a block, V vocabulary. ``s`` and ``t`` are the student's and the teacher's probabilities on the common
support, renormalised there; ``L = log t - log s``; ``K(a) = log sum exp(log s + a L)``, so ``q_a = s^(1-a) t^a / e^K``
and ``K(0) = K(1) = 0``. All in nats. Truncated columns are numbers too low for any exponential, never -inf, so that no
product is NaN; masks would cost more than the exponentials (``torch.where`` is not vectorised on a CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

NOTHING = (
    -1e30
)  # logits at or below are truncated: -inf, and the finfo.min of float32 and bfloat16 with which some mask
# Passes of each solver. Measured on random, peaked, near and far pairs: one less leaves 3e-4 on the hardest of them.
KL_STEPS, ESS_STEPS = 4, 7
# Rounding decides the sign of an equation next to its root: a strict bracket would throw a converged point away.
_SLACK = 1e-5


class Solved(NamedTuple):
    """What is known of each row, [R] each."""

    alpha: torch.Tensor
    student_norm: torch.Tensor
    teacher_norm: torch.Tensor
    log_norm: torch.Tensor
    overlap: torch.Tensor


@dataclass
class _Pair:
    """Two rows of logits as the solvers want them."""

    student_RV: torch.Tensor  # log s up to a constant per row
    ratio_RV: torch.Tensor  # log t - log s, up to ``shift`` until it is centred
    spare_RV: tuple[torch.Tensor, torch.Tensor]
    student_top_R1: torch.Tensor  # largest logits: what the rows were shifted by
    teacher_top_R1: torch.Tensor
    shift_R1: torch.Tensor | None = None  # what was taken off the ratio so that both sides of it are normalised


class Workspace:
    """Buffers for blocks of up to ``rows`` rows; fresh ones for each would cost as much as the arithmetic."""

    def __init__(self, rows: int, vocabulary: int, like: torch.Tensor, dtype: torch.dtype) -> None:
        self._buffers = [torch.empty(rows, vocabulary, dtype=dtype, device=like.device) for _ in range(4)]

    def take(self, rows: int) -> list[torch.Tensor]:
        return [buffer[:rows] for buffer in self._buffers]


def solve_block(
    student_logits_RV: torch.Tensor,
    teacher_logits_RV: torch.Tensor,
    workspace: Workspace,
    *,
    method: str,
    alpha: float | torch.Tensor | None,
    scale: float | torch.Tensor,
) -> Solved:
    """``alpha``: the weight itself, one number or [R], with method "fixed"."""
    pair, student_norm_R1, teacher_norm_R1 = _prepare(student_logits_RV, teacher_logits_RV, workspace)
    if alpha is not None:
        alpha_R1 = torch.zeros_like(student_norm_R1) + (alpha[:, None] if isinstance(alpha, torch.Tensor) else alpha)
    else:
        alpha_R1 = _SOLVERS[method](pair)
    alpha_R1 = (alpha_R1 * scale).clamp_max_(1)

    top_R1, total_R1, _ = _weights(pair, alpha_R1)
    overlap_R1 = top_R1 > NOTHING
    valid_R1 = (student_norm_R1 > -torch.inf) & (teacher_norm_R1 == teacher_norm_R1)  # no NaN, no +inf, a student
    # In float64: the parts are of the size of the logits, the log-probs they normalise may be 1e-6.
    student_top_R1, teacher_top_R1 = pair.student_top_R1.double(), pair.teacher_top_R1.double()
    shift_R1 = teacher_top_R1 - student_top_R1
    if pair.shift_R1 is not None:
        shift_R1 = shift_R1 + pair.shift_R1
    log_norm_R1 = student_top_R1 + alpha_R1 * shift_R1 + (top_R1 + total_R1.double().log())
    log_norm_R1 = torch.where(overlap_R1, log_norm_R1.to(student_norm_R1.dtype), student_norm_R1)
    alpha_R1 = torch.where(overlap_R1, alpha_R1, 0.0)
    return Solved(
        alpha=torch.where(valid_R1, alpha_R1, torch.nan)[:, 0],
        student_norm=student_norm_R1[:, 0],
        teacher_norm=teacher_norm_R1[:, 0],
        log_norm=torch.where(valid_R1, log_norm_R1, torch.nan)[:, 0],
        overlap=(overlap_R1 & valid_R1)[:, 0],
    )


def _prepare(
    student_logits_RV: torch.Tensor, teacher_logits_RV: torch.Tensor, workspace: Workspace
) -> tuple[_Pair, torch.Tensor, torch.Tensor]:
    """The pair, and both models' normalisers [R, 1] over their own supports."""
    student_RV, teacher_RV, *spare_RV = workspace.take(len(student_logits_RV))
    tops, norms = [], []
    for logits_RV, out_RV in ((student_logits_RV, student_RV), (teacher_logits_RV, teacher_RV)):
        top_R1 = logits_RV.amax(-1, keepdim=True).to(out_RV.dtype).clamp_min_(NOTHING)
        torch.sub(logits_RV, top_R1, out=out_RV)
        norms.append(_sum(torch.exp(out_RV, out=spare_RV[0])).log_().add_(top_R1))
        out_RV.clamp_min_(NOTHING)
        tops.append(top_R1)
    either_RV = torch.minimum(student_RV, teacher_RV, out=spare_RV[0])
    penalty_RV = either_RV.clamp_max_(NOTHING / 10).sub_(NOTHING / 10)  # 0 on the common support, -9e29 elsewhere
    ratio_RV = teacher_RV.sub_(student_RV)
    student_RV.add_(penalty_RV, alpha=10)  # below the ratio's 1e30 times any exponent in use
    pair = _Pair(
        student_RV=student_RV,
        ratio_RV=ratio_RV,
        spare_RV=(spare_RV[0], spare_RV[1]),
        student_top_R1=tops[0],
        teacher_top_R1=tops[1],
    )
    return pair, norms[0], norms[1]


def _weights(pair: _Pair, exponent_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest log-weight, sum of weights [R, 1], weights e^(log s + a L - largest) in the first spare buffer)."""
    weights_RV = pair.spare_RV[0]
    torch.addcmul(pair.student_RV, pair.ratio_RV, exponent_R1, out=weights_RV)
    top_R1 = weights_RV.amax(-1, keepdim=True)
    weights_RV.sub_(top_R1).exp_()
    return top_R1, _sum(weights_RV), weights_RV


def _sum(values_RV: torch.Tensor) -> torch.Tensor:
    """Torch adds in pairs; compiled code adds one after another, which in float32 puts 2e-5 on the weight."""
    if torch.compiler.is_compiling():
        return _exact_sum(values_RV).to(values_RV.dtype)
    return values_RV.sum(-1, keepdim=True)


def _rough_sum(values_RV: torch.Tensor) -> torch.Tensor:
    """Of derivatives: an error makes the next step shorter or longer, and moves no root."""
    return values_RV.sum(-1, keepdim=True)


def _exact_sum(values_RV: torch.Tensor) -> torch.Tensor:
    """In float64. Where both models are all but certain, what they differ in is 1e-8 beside a weight of 1."""
    return values_RV.sum(-1, keepdim=True, dtype=torch.float64)


def _centre(pair: _Pair, *, entropies: bool = False) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Normalises the ratio; (the entropies of ``s`` and ``t`` where asked for, what rounding makes of L squared)."""
    log_weights_RV, weights_RV = pair.spare_RV
    norms, tops, found = [], [], []
    for end in range(2):
        if end == 0:
            log_weights_RV.copy_(pair.student_RV)
        else:
            torch.add(pair.student_RV, pair.ratio_RV, out=log_weights_RV)
        top_R1 = log_weights_RV.amax(-1, keepdim=True)
        total_R1 = _exact_sum(torch.exp(log_weights_RV.sub_(top_R1), out=weights_RV))
        log_total_R1 = total_R1.log()
        if entropies:
            found.append((log_total_R1 - _sum(weights_RV.mul_(log_weights_RV)) / total_R1).clamp_min_(0))
        norms.append(log_total_R1)
        tops.append(top_R1)
    pair.shift_R1 = ((tops[1] - tops[0]) + (norms[1] - norms[0])).to(pair.ratio_RV.dtype)
    pair.ratio_RV.sub_(pair.shift_R1)
    precision = 8 * torch.finfo(pair.ratio_RV.dtype).eps
    return found, (tops[0].abs() + tops[1].abs() + 1).mul_(precision).square_()


def _entropy(pair: _Pair) -> torch.Tensor:
    (student_R1, teacher_R1), _ = _centre(pair, entropies=True)
    both_R1 = student_R1 + teacher_R1
    return torch.where(both_R1 > 0, student_R1 / both_R1, 0.5).to(pair.ratio_RV.dtype)


def _kl_symmetry(pair: _Pair) -> torch.Tensor:
    """The root of ``K'(a) = E_q[L]``, as that of ``log sum_{L>0} q L - log sum_{L<0} q |L|``.

    The two have the same root and sign. K' is flat far from it when the models are far apart (a tanh for two tokens);
    the difference of logs is all but a straight line there, so four steps of third order do what ten of Newton's on
    K' do not.
    """
    _, rounding_R1 = _centre(pair)
    ratio_RV, parts_RV = pair.ratio_RV, pair.spare_RV[1]
    bracket = _Bracket(ratio_RV[:, :1])
    equal_R1 = torch.zeros_like(rounding_R1, dtype=torch.bool)
    for step in range(KL_STEPS):
        _, total_R1, weighted_RV = _weights(pair, bracket.alpha_R1)
        torch.clamp_min(weighted_RV.mul_(ratio_RV), 0, out=parts_RV)
        mean_R1, above_R1 = _sum(weighted_RV), _sum(parts_RV)
        below_R1 = above_R1 - mean_R1
        square_R1, square_above_R1 = _rough_sum(weighted_RV.mul_(ratio_RV)), _rough_sum(parts_RV.mul_(ratio_RV))
        if step == 0:
            equal_R1 = square_R1 <= rounding_R1 * total_R1
        up_R1, down_R1 = square_above_R1 / above_R1, (square_R1 - square_above_R1) / below_R1
        cube_R1, cube_above_R1 = _rough_sum(weighted_RV.mul_(ratio_RV)), _rough_sum(parts_RV.mul_(ratio_RV))
        curve_R1 = cube_above_R1 / above_R1 - up_R1 * up_R1
        curve_R1 -= (cube_above_R1 - cube_R1) / below_R1 - down_R1 * down_R1
        bracket.narrow(mean_R1 > 0, (above_R1 / below_R1).log_(), up_R1 + down_R1, curve_R1)
    return torch.where(equal_R1, 0.5, bracket.alpha_R1)


def _ess_weights(pair: _Pair) -> torch.Tensor:
    """The root of ``log K(-a) - log K(2 - a)``: ``sum s^2 / q = sum t^2 / q`` less the normaliser that both contain."""
    _, rounding_R1 = _centre(pair)
    bracket = _Bracket(pair.ratio_RV[:, :1])
    _, mean_R1, variance_R1 = _cumulants(pair, bracket.alpha_R1)
    equal_R1 = variance_R1 + mean_R1 * mean_R1 <= rounding_R1
    base_R1 = _cumulants(pair, torch.zeros_like(bracket.alpha_R1))[0]
    for _ in range(ESS_STEPS):
        student = _cumulants(pair, -bracket.alpha_R1)
        teacher = _cumulants(pair, 2 - bracket.alpha_R1)
        student_R1, teacher_R1 = student[0] - base_R1, teacher[0] - base_R1
        up_R1, down_R1 = -student[1] / student_R1, -teacher[1] / teacher_R1
        curve_R1 = (student[2] / student_R1 - up_R1 * up_R1) - (teacher[2] / teacher_R1 - down_R1 * down_R1)
        steps = ((student_R1 / teacher_R1).log_(), up_R1 - down_R1, curve_R1)
        bracket.narrow(student_R1 > teacher_R1, *(x.to(pair.ratio_RV.dtype) for x in steps))
    return torch.where(equal_R1, 0.5, bracket.alpha_R1)


def _cumulants(pair: _Pair, exponent_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(K up to a constant, mean and variance of L), float64 [R, 1], of weights ``s e^(exponent L)``."""
    top_R1, _, weights_RV = _weights(pair, exponent_R1)
    total_R1 = _exact_sum(weights_RV)
    mean_R1 = _exact_sum(weights_RV.mul_(pair.ratio_RV)) / total_R1
    square_R1 = _exact_sum(weights_RV.mul_(pair.ratio_RV)) / total_R1
    return top_R1 + total_R1.log(), mean_R1, square_R1 - mean_R1 * mean_R1


class _Bracket:
    """An interval that contains the root of a rising function, and the next point to try in it."""

    def __init__(self, like_R1: torch.Tensor) -> None:
        self.low_R1 = torch.zeros_like(like_R1)
        self.high_R1 = torch.ones_like(like_R1)
        self.alpha_R1 = torch.full_like(like_R1, 0.5)

    def narrow(
        self, above_R1: torch.Tensor, value_R1: torch.Tensor, slope_R1: torch.Tensor, curve_R1: torch.Tensor
    ) -> None:
        """A step of Halley's (``curve`` is the second derivative) where it stays inside, else halve."""
        self.high_R1 = torch.where(above_R1, self.alpha_R1 + _SLACK, self.high_R1)
        self.low_R1 = torch.where(above_R1, self.low_R1, self.alpha_R1 - _SLACK)
        scale_R1 = torch.addcmul(slope_R1 * slope_R1, value_R1, curve_R1, value=-0.5)
        next_R1 = torch.addcdiv(self.alpha_R1, value_R1 * slope_R1, scale_R1, value=-1)
        inside_R1 = torch.clamp(next_R1, self.low_R1, self.high_R1) == next_R1  # not if it is NaN
        self.alpha_R1 = torch.where(inside_R1, next_R1, torch.lerp(self.low_R1, self.high_R1, 0.5))


_SOLVERS = {"kl_symmetry": _kl_symmetry, "ess_weights": _ess_weights, "entropy": _entropy}
