"""Runs micro-batches through a model with Megatron's schedules: forward only, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from opd.config.schema import ParallelFlags
from opd.data.batching import MicroBatchLimit, micro_batches
from opd.maths.head import OutputHead
from opd.megatron_backend.hf_bridge import ModelParts, model_parts, output_head
from opd.megatron_backend.packing import PackedMicroBatch, pack
from opd.types import TokenBatch


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What a loss sees on the last pipeline stage. R: positions of this rank that predict a response token.

    Attributes:
        model: the model that ran, unwrapped.
        output: hidden states [positions, 1, H] before the output layer, this rank's under sequence parallelism.
    """

    batch: TokenBatch
    packed: PackedMicroBatch
    model: torch.nn.Module
    output: torch.Tensor

    def hidden_RH(self) -> torch.Tensor:
        """Whole on every tensor-parallel rank; each rank gives its part of the gradient, and they are added up. For a
        head that is split over the vocabulary."""
        if self.model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(self.output, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(self.output)
        return hidden[:, 0].index_select(0, self.packed.rows_R)

    def replicated_hidden_RH(self) -> torch.Tensor:
        """Whole on every tensor-parallel rank, each of which computes the whole gradient."""
        hidden = self.output
        if self.model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden[:, 0].index_select(0, self.packed.rows_R)

    def head(self) -> OutputHead:
        return output_head(self.model)

    def rows(self, values_T: torch.Tensor) -> torch.Tensor:
        """Of per-token values of the micro-batch, those that this rank's positions predict, on its device."""
        return values_T.to(self.output.device)[self.packed.place_R]


# -> (loss, tensors to return)
LossFn = Callable[[MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def split(batch: TokenBatch, limit: MicroBatchLimit) -> list[list[int]]:
    """Sample indices of this rank's micro-batches; every data-parallel rank gets the same number of them.

    Pipeline stages and collectives need equal counts, and an interleaved pipeline a multiple of its stages. A rank with
    too few samples repeats its first one; a repetition has no weight in any loss (see ``run``).
    """
    multiple = 1
    if mpu.get_virtual_pipeline_model_parallel_world_size() is not None:
        multiple = mpu.get_pipeline_model_parallel_world_size()
    agreed = multiple
    while True:
        plan = micro_batches(batch.lengths, limit, at_least=agreed)
        wanted = _largest_of_data_parallel_ranks(len(plan))
        if wanted <= agreed:
            return plan + [[0]] * (agreed - len(plan))
        agreed = -(-wanted // multiple) * multiple


def _largest_of_data_parallel_ranks(number: int) -> int:
    group = mpu.get_data_parallel_group()
    if group.size() == 1:
        return number
    largest = torch.tensor(number, device=current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)


def run(
    model: torch.nn.Module, batch: TokenBatch, plan: list[list[int]], loss_fn: LossFn, *, forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    """One pass over the micro-batches of ``plan``. Gradients end up in the model's buffers, reduced over all ranks.

    Args:
        model: one GPTModel, bare or wrapped, or the ``ModelParts`` of an interleaved pipeline.

    Returns:
        what ``loss_fn`` returned for each micro-batch, on the last pipeline stage; an empty list elsewhere.
    """
    seen: set[int] = set()
    items = []
    for indices in plan:
        repeated = seen.issuperset(indices)
        seen.update(indices)
        micro = batch.select(indices)
        items.append((micro.without_weight() if repeated else micro, _pack(micro)))
    running = list(model.running) if isinstance(model, ModelParts) else [model]
    inner = model_parts(model)[-1]

    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        micro, packed = next(iterator)
        output = model(packed.input_ids_1P, packed.position_ids_1P, None, packed_seq_params=packed.packed_seq_params)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            value, outputs = loss_fn(MicroBatch(batch=micro, packed=packed, model=inner, output=output))
            return value, torch.zeros((), dtype=torch.int, device=value.device), outputs

        return output, loss

    applied_head, inner.applies_head = inner.applies_head, False
    try:
        with torch.set_grad_enabled(not forward_only):
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(items) for _ in running] if len(running) > 1 else iter(items),
                model=running,
                num_microbatches=len(items),
                seq_length=max(item[1].input_ids_1P.shape[1] for item in items),
                micro_batch_size=1,
                forward_only=forward_only,
            )
    finally:
        inner.applies_head = applied_head


def whole_tokens(micro: MicroBatch, values_KR: torch.Tensor) -> torch.Tensor:
    """[K, response tokens of the micro-batch] from the values at this rank's positions, over context-parallel ranks."""
    whole = values_KR.new_zeros(values_KR.shape[0], micro.packed.response_tokens)
    whole[:, micro.packed.place_R] = values_KR
    return over_context_ranks(whole)


def whole_rows(micro: MicroBatch, values_RH: torch.Tensor) -> torch.Tensor:
    """As ``whole_tokens``, [response tokens of the micro-batch, H]."""
    whole = values_RH.new_zeros(micro.packed.response_tokens, values_RH.shape[1])
    whole[micro.packed.place_R] = values_RH
    return over_context_ranks(whole)


def gather_tokens(
    lengths: list[int],
    plan: list[list[int]],
    pieces_KT: list[torch.Tensor],
    *,
    rows: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[rows, T] in the batch's order, on the CPU, on every pipeline stage; the last one gives the pieces.

    Args:
        lengths: tokens of each sample in its piece.
    """
    if mpu.is_pipeline_last_stage():
        whole = in_batch_order(lengths, plan, pieces_KT)
    else:
        whole = torch.zeros(rows, sum(lengths), dtype=dtype, device=current_device())
    return from_last_stage(whole).cpu()


def in_batch_order(lengths: list[int], plan: list[list[int]], pieces_KT: list[torch.Tensor]) -> torch.Tensor:
    """The pieces of the micro-batches side by side."""
    whole = pieces_KT[0].new_zeros(pieces_KT[0].shape[0], sum(lengths))
    for places_T, piece in zip(_places(lengths, plan), pieces_KT, strict=True):
        whole[:, places_T] = piece
    return whole


def rows_in_batch_order(lengths: list[int], plan: list[list[int]], pieces_TH: list[torch.Tensor]) -> torch.Tensor:
    """The rows of the micro-batches' pieces, one sample after the other. Takes the pieces out of their list: together
    they are as large as what is made of them, and that can be most of the host's memory."""
    whole = pieces_TH[0].new_empty(sum(lengths), pieces_TH[0].shape[1])
    pieces_TH.reverse()
    for places_T in _places(lengths, plan):
        whole[places_T] = pieces_TH.pop()
    return whole


def _places(lengths: list[int], plan: list[list[int]]) -> Iterator[torch.Tensor]:
    """Of each micro-batch's tokens in the batch."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for indices in plan:
        yield torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in indices])


def over_context_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Adds up, in place, what the context-parallel ranks hold: each has the tokens that its positions predict."""
    if mpu.get_context_parallel_world_size() > 1:
        dist.all_reduce(tensor, group=mpu.get_context_parallel_group())
    return tensor


def from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Gives every pipeline stage the last one's values, in place."""
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            tensor, src=mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
        )
    return tensor


def _pack(micro: TokenBatch) -> PackedMicroBatch:
    return pack(
        micro.tokens,
        micro.response_lengths,
        cp_rank=mpu.get_context_parallel_rank(),
        cp_size=mpu.get_context_parallel_world_size(),
        total_multiple=mpu.get_tensor_model_parallel_world_size(),
        device=current_device(),
    )


def micro_batch_limit(flags: ParallelFlags, *, context_parallel_size: int) -> MicroBatchLimit:
    """Of a micro-batch on all its context-parallel ranks together."""
    return MicroBatchLimit(tokens=flags.max_tokens_per_gpu * context_parallel_size, samples=flags.micro_batch_size)


def current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
