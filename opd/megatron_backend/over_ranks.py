"""Small values that all ranks have to know: sums, flags, objects."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from opd.megatron_backend.groups import patient_group
from opd.megatron_backend.pipeline import current_device


def sum_over_ranks(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    """Adds up, or takes the largest of, per-share numbers over the data-parallel ranks."""
    if mpu.get_data_parallel_world_size() == 1:
        return {**sums, **maxima}
    merged = {}
    for values, op in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=current_device())
        dist.all_reduce(tensor, op=op, group=mpu.get_data_parallel_group())
        merged.update(zip(values, tensor.tolist(), strict=True))
    return merged


def from_all_shares(values: dict[int, Any]) -> dict[int, Any]:
    """On rank 0 the entries of all data-parallel shares; elsewhere only this rank's. The other groups of data-parallel
    ranks hold the same shares as rank 0's."""
    group = mpu.get_data_parallel_group()
    if group.size() == 1 or 0 not in dist.get_process_group_ranks(group):
        return values
    shares: list[Any] | None = [None] * group.size() if dist.get_rank() == 0 else None
    dist.gather_object(values, shares, dst=0, group=group)
    return values if shares is None else {key: value for share in shares for key, value in share.items()}


def on_any_rank(yes: bool) -> bool:
    """Over data-, tensor-, pipeline- and context-parallel ranks alike."""
    if dist.get_world_size() == 1:
        return yes
    flag = torch.tensor(float(yes), device=current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def from_first_rank(value: Any) -> Any:
    """Rank 0's ``value``, on every rank, however long it takes to come."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=patient_group())
    return box[0]
