"""A batch that lies in shares on the data-parallel ranks of one world, brought together for another world."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from opd.types import TokenBatch

# What a critic reads beyond the fields that every batch has.
_CRITIC_FIELDS = frozenset({"values_T", "returns_T"})


@dataclass(frozen=True, kw_only=True)
class Values:
    """One number per response token of a whole batch, by sample; samples in ascending order."""

    sample_N: list[int]
    lengths: list[int]
    values_T: torch.Tensor

    @staticmethod
    def of(batch: TokenBatch) -> Values:
        return Values(
            sample_N=batch.sample_N.tolist(), lengths=batch.response_lengths, values_T=batch.values_T.detach().cpu()
        )

    def select(self, batch: TokenBatch) -> torch.Tensor:
        """[T] for the samples of ``batch``, in its order."""
        by_sample = dict(zip(self.sample_N, self.values_T.split(self.lengths), strict=True))
        chosen = [by_sample[sample] for sample in batch.sample_N.tolist()]
        return torch.cat(chosen).to(batch.loss_mask_T.device)


def for_critic(batch: TokenBatch) -> TokenBatch:
    """``batch`` without what a critic does not read, in main memory."""
    kept: dict[str, Any] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if field.default is not dataclasses.MISSING and field.name not in _CRITIC_FIELDS:
            value = None
        kept[field.name] = value.detach().cpu() if isinstance(value, torch.Tensor) else value
    return TokenBatch(**kept)


def gathered(share: TokenBatch, group: dist.ProcessGroup) -> TokenBatch | None:
    """All samples of the batch, in order, on the world's rank 0; None elsewhere.

    To be called by all ranks; ``group``: the data-parallel group of this one, without context parallelism. The other
    groups hold the same shares as rank 0's.
    """
    if 0 not in dist.get_process_group_ranks(group):
        return None
    shares: list[TokenBatch] | None = [share] * group.size() if dist.get_rank() == 0 else None
    if group.size() > 1:
        dist.gather_object(share, shares, dst=0, group=group)
    return None if shares is None else in_order(shares)


def in_order(shares: list[TokenBatch]) -> TokenBatch:
    """One batch of the samples of all shares, by ascending ``sample_N``."""
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(TokenBatch):
        values = [getattr(share, field.name) for share in shares]
        if any(value is None for value in values):
            joined[field.name] = None
        elif isinstance(values[0], list):
            joined[field.name] = [item for value in values for item in value]
        elif isinstance(values[0], dict):
            joined[field.name] = {key: item for value in values for key, item in value.items()}
        else:
            joined[field.name] = torch.cat(values)
    whole = TokenBatch(**joined)
    return whole.select(torch.argsort(whole.sample_N).tolist())
