"""Rows of logits whose vocabulary is split over ranks: softmax, sums, look-ups and top-k that give each rank the result
of one process.

Shapes: B rows, V this rank's contiguous slice of the vocabulary (all of it when ``group`` is None), K kept ids. Ids are
those of the whole vocabulary; -1 marks an unused place.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

# The log of a probability of exactly 0. Finite, so that 0 x log 0 is 0 and not NaN, and far below any real log-prob.
LOG_ZERO = -1e30


def wide_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if the first tensor is, else float32: the type in which softmaxes and sums are taken."""
    return torch.float64 if tensors[0].dtype == torch.float64 else torch.float32


def first_column(columns: int, group: dist.ProcessGroup | None) -> int:
    """Id of this rank's first column, every rank holding ``columns`` of them."""
    return dist.get_rank(group) * columns if group is not None else 0


def vocabulary_size(columns: int, group: dist.ProcessGroup | None) -> int:
    return columns * dist.get_world_size(group) if group is not None else columns


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """In place; returns its argument."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def all_reduce_max(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """In place; returns its argument."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def exp_into(
    logits_BV: torch.Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None,
    shifted_BV: torch.Tensor,
    exp_BV: torch.Tensor,
) -> torch.Tensor:
    """Writes ``logits / temperature`` less the row's maximum (at least ``LOG_ZERO``), and its exponential.

    A softmax that was not divided through: ``log p = shifted - log sum``, ``p = exp / sum``. Normalising the matrices
    would be two more passes over each; whoever sums over a row can divide the sum instead. ``shifted_BV`` may be
    ``logits_BV`` itself. Columns of -inf or finfo.min get probability 0.

    Returns:
        the sum of the exponentials of each row, [B].
    """
    scaled_BV = logits_BV if temperature == 1.0 else shifted_BV.copy_(logits_BV).div_(temperature)  # widened first
    max_B = all_reduce_max(scaled_BV.amax(dim=-1).to(shifted_BV.dtype), group)
    torch.sub(scaled_BV, max_B[:, None], out=shifted_BV).clamp_min_(LOG_ZERO)
    return all_reduce_sum(torch.exp(shifted_BV, out=exp_BV).sum(dim=-1), group)


def log_softmax_into(
    logits_BV: torch.Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None,
    log_BV: torch.Tensor,
    prob_BV: torch.Tensor,
) -> torch.Tensor:
    """Writes ``log softmax(logits / temperature)`` and its exponential, as `exp_into` but normalised.

    Returns:
        the largest log-prob of each row, [B].
    """
    sumexp_B = exp_into(logits_BV, temperature=temperature, group=group, shifted_BV=log_BV, exp_BV=prob_BV)
    log_sumexp_B = sumexp_B.log()
    log_BV.sub_(log_sumexp_B[:, None])
    prob_BV.mul_(sumexp_B.reciprocal()[:, None])
    return -log_sumexp_B


def locate(ids_BK: torch.Tensor, columns: int, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(column on this rank, whether it is on this rank); the column is some valid one where it is not."""
    column_BK = ids_BK - first_column(columns, group)
    here_BK = (ids_BK >= 0) & (column_BK >= 0) & (column_BK < columns)
    return column_BK.clamp(0, columns - 1), here_BK


def gather_logprobs(
    shifted_BV: torch.Tensor, sumexp_B: torch.Tensor, ids_BK: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Log-probs at ``ids_BK``, equal on all ranks, from what `exp_into` gives; ``LOG_ZERO`` where the id is -1."""
    column_BK, here_BK = locate(ids_BK, shifted_BV.shape[1], group)
    found_BK = all_reduce_sum(torch.where(here_BK, shifted_BV.gather(1, column_BK), 0.0), group)
    return (found_BK - sumexp_B.log()[:, None]).masked_fill_(ids_BK < 0, LOG_ZERO)


def top_ids(scores_BV: torch.Tensor, k: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Ids of the k largest scores of each row over the whole vocabulary, largest first."""
    columns = scores_BV.shape[1]
    best_BK, ids_BK = scores_BV.topk(min(k, columns), dim=-1)
    if group is None:
        return ids_BK
    ids_BK = ids_BK + first_column(columns, group)
    # The k best overall are among every rank's k best.
    scores = [torch.empty_like(best_BK) for _ in range(dist.get_world_size(group))]
    ids = [torch.empty_like(ids_BK) for _ in scores]
    dist.all_gather(scores, best_BK.contiguous(), group=group)
    dist.all_gather(ids, ids_BK.contiguous(), group=group)
    chosen_BK = torch.cat(scores, dim=1).topk(k, dim=-1).indices
    return torch.cat(ids, dim=1).gather(1, chosen_BK)
