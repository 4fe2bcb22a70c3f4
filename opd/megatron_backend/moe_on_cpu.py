"""Expert layers where there is no CUDA: dispatch without streams, and gloo with pieces of uneven sizes."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


@functools.cache
def dispatch_without_cuda() -> None:
    """Lets the all-to-all dispatcher run on a CPU. Idempotent.

    It copies counts of tokens to the host on a stream of its own and waits for that stream. On a CPU the counts are
    where they are needed; what is left of the copy is the change into lists of those that torch wants as lists.

    Experts that are cut over tensor-parallel ranks gather and scatter as many tokens as each rank happens to have,
    which gloo, unlike NCCL, does not do by itself.
    """
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = contextlib.nullcontext()  # not None: no stream is made
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _counts_as_lists
    mappings._gather_along_first_dim = _uneven(mappings._gather_along_first_dim, _gather)
    mappings._reduce_scatter_along_first_dim = _uneven(mappings._reduce_scatter_along_first_dim, _reduce_scatter)


def _counts_as_lists(
    self: MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: torch.Tensor | None = None
) -> torch.Tensor | None:
    if point == self.cuda_dtoh_point and not self.drop_and_pad:
        for name in ("input_splits", "output_splits"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.tolist())
    return tokens_per_expert


def _uneven(even: Any, uneven: Any) -> Any:
    """megatron-core's collective along the first dimension, with ours in its place where sizes are given."""

    @functools.wraps(even)
    def collective(
        tensor: torch.Tensor, group: dist.ProcessGroup, sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even(tensor, group, sizes, use_global_buffer)
        return uneven(tensor, group, sizes)

    return collective


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """Pieces of ``sizes`` rows, padded to the longest for the way."""
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    pieces = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


def _reduce_scatter(tensor: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """This rank's ``sizes[rank]`` rows of the sum."""
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].clone()
