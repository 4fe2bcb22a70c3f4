"""The control of the tiny task's comparison: a "teacher" that knows nothing.

A gain under on-policy distillation may have nothing to do with what the teacher knows: pushing down whatever the
student itself finds unlikely sharpens its samples too (arXiv 2608.31046 is the reason for this control). So the curves
of the objectives have these beside them, for ``--custom-advantage-function-path``:

    null_teacher.alone              in place of the penalty, without task reward
    null_teacher.alone_wide         the same, with a threshold that catches three times as many tokens
    null_teacher.beside_the_reward  in place of the penalty, on top of the task reward's advantage
    null_teacher.faint_beside_the_reward  the same at a tenth of the strength

Measured on 512 answers of the unmodified student at temperature 1: 0.97% of its tokens are below ``THRESHOLD`` and 2.9%
below ``WIDE_THRESHOLD``; 9% and 30% of the reverse KL to the real teacher are on them. The real penalty
(``--opd-kl-coef 1``) takes 3.9 and 4.1 nats from such a token on average: ``ADVANTAGE`` is of that size.
"""

from __future__ import annotations

import argparse
import math

import torch

from opd.types import TokenBatch

THRESHOLD = 0.5  # of the probability that the student gave the token before the update: less likely than all others
WIDE_THRESHOLD = 0.9
ADVANTAGE = -4.0  # of each token below


def alone(args: argparse.Namespace, batch: TokenBatch) -> torch.Tensor:
    """``ADVANTAGE`` on the student's unlikely tokens, 0 on the others: [T]. Neither teacher nor reward is read."""
    return fixed_penalty(batch.student_logprobs_T, threshold=THRESHOLD)


def alone_wide(args: argparse.Namespace, batch: TokenBatch) -> torch.Tensor:
    """``alone`` with ``WIDE_THRESHOLD``."""
    return fixed_penalty(batch.student_logprobs_T, threshold=WIDE_THRESHOLD)


def beside_the_reward(args: argparse.Namespace, batch: TokenBatch) -> torch.Tensor:
    """``alone`` added to the advantage so far: [T]. With ``--opd-kl-coef 0`` that is the task reward's alone."""
    return batch.advantages_T + alone(args, batch)


def faint_beside_the_reward(args: argparse.Namespace, batch: TokenBatch) -> torch.Tensor:
    """``beside_the_reward`` with a tenth of ``alone``, below the size of the reward's own advantages."""
    return batch.advantages_T + 0.1 * alone(args, batch)


def fixed_penalty(logprobs_T: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """``ADVANTAGE`` where ``exp(logprobs_T)`` is below ``threshold``, else 0."""
    return ADVANTAGE * (logprobs_T < math.log(threshold)).float()
