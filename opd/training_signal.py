"""What each token is told: estimator's advantage -> whitening -> minus coef x reverse KL.

The penalty comes after the whitening on purpose: whitening the sum would divide ``--opd-kl-coef`` out again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from opd.config.schema import AlgorithmFlags, OpdFlags
from opd.maths.advantages import group_relative, whiten
from opd.maths.penalty import subtract_reverse_kl
from opd.types import TokenBatch


def outcome_advantages(rewards_N: torch.Tensor, group_ids_N: torch.Tensor, flags: AlgorithmFlags) -> torch.Tensor:
    """One advantage per sample from the task rewards of the whole rollout."""
    return group_relative(rewards_N, group_ids_N, normalize_std=not flags.disable_grpo_std_normalization)


def add_training_signal(
    batch: TokenBatch,
    *,
    algorithm: AlgorithmFlags,
    opd: OpdFlags,
    data_parallel_group: dist.ProcessGroup | None = None,
) -> TokenBatch:
    """Fills ``advantages_T`` and, with OPD, ``reverse_kl_T`` (nats). ``batch`` is this rank's share."""
    lengths_N = torch.tensor(batch.response_lengths)
    advantages_T = batch.outcome_advantages_N.repeat_interleave(lengths_N)
    if algorithm.normalize_advantages:
        advantages_T = whiten(advantages_T, batch.loss_mask_T, group=data_parallel_group)
    if not opd.use_opd:
        return batch.with_(advantages_T=advantages_T)

    scored_T = batch.teacher_scored_N.repeat_interleave(lengths_N)
    advantages_T, reverse_kl_T = subtract_reverse_kl(
        advantages_T,
        batch.student_kl_logprobs_T,
        batch.teacher_logprobs_T,
        batch.loss_mask_T * scored_T,
        coef=opd.opd_kl_coef,
    )
    return batch.with_(advantages_T=advantages_T, reverse_kl_T=reverse_kl_T)
