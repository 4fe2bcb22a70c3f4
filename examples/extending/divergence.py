"""Objectives of your own, for ``--distillation-type custom --custom-divergence-function-path``.

Both arguments are log-probs [rows, vocabulary] in nats. Return terms of that shape that add up to each row's
divergence, or the divergence itself, [rows]. Autograd gives the gradient.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor


def reverse_kl(args: argparse.Namespace, student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher): what ``--distillation-type reverse_kl`` computes."""
    return student.exp() * (student - teacher)


def hellinger(args: argparse.Namespace, student: Tensor, teacher: Tensor) -> Tensor:
    """Squared Hellinger distance, ``1 - sum sqrt(s t)``: symmetric, and never above 1."""
    return 0.5 * ((student / 2).exp() - (teacher / 2).exp()).square()


def forward_kl_where_unsure(args: argparse.Namespace, student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) where the teacher's entropy is above 1 nat, else KL(student || teacher). The choice takes
    the whole row, so this one needs ``--tensor-model-parallel-size 1``."""
    unsure = -(teacher.exp() * teacher).sum(dim=-1, keepdim=True) > 1.0
    return torch.where(unsure, teacher.exp() * (teacher - student), student.exp() * (student - teacher)).sum(dim=-1)
