"""Runs micro-batches through a model with Megatron's schedules: forward only, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func

from opd.data.batching import micro_batches
from opd.maths.logprobs import token_logprobs
from opd.megatron_backend.packing import PackedMicroBatch, pack
from opd.types import TokenBatch

# (micro-batch, logits at the rows that predict response tokens [R, V/tp]) -> (loss, tensors to return)
LossFn = Callable[[TokenBatch, PackedMicroBatch, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def split(batch: TokenBatch, *, max_tokens: int) -> list[list[int]]:
    """Sample indices of this rank's micro-batches; every data-parallel rank gets the same number of them.

    Pipeline stages and collectives need equal counts. A rank with too few samples repeats its first one; the loss of a
    repetition is multiplied by 0 (see ``run``).
    """
    plan = micro_batches(batch.lengths, max_tokens=max_tokens)
    count = torch.tensor(len(plan))
    group = mpu.get_data_parallel_group()
    if group.size() > 1:
        count = count.to(_device())
        dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
    if int(count) > len(plan):
        plan = micro_batches(batch.lengths, max_tokens=max_tokens, at_least=int(count))
        plan += [[0]] * (int(count) - len(plan))
    return plan


def run(
    model: torch.nn.Module, batch: TokenBatch, plan: list[list[int]], loss_fn: LossFn, *, forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    """One pass over the micro-batches of ``plan``. Gradients end up in the model's buffers, reduced over all ranks.

    Returns:
        what ``loss_fn`` returned for each micro-batch, on the last pipeline stage; an empty list elsewhere.
    """
    seen: set[int] = set()
    items = []
    for indices in plan:
        repeated = seen.issuperset(indices)
        seen.update(indices)
        micro = batch.select(indices)
        items.append((micro.with_(loss_mask_T=micro.loss_mask_T * 0) if repeated else micro, _pack(micro)))

    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        micro, packed = next(iterator)
        output = model(packed.input_ids_1P, packed.position_ids_1P, None, packed_seq_params=packed.packed_seq_params)

        def loss(logits_1PV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            value, outputs = loss_fn(micro, packed, logits_1PV[0].index_select(0, packed.rows_R))
            return value, torch.zeros((), dtype=torch.int, device=value.device), outputs

        return output, loss

    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(items),
            model=[model],
            num_microbatches=len(items),
            seq_length=max(item[1].input_ids_1P.shape[1] for item in items),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def response_logprobs(
    model: torch.nn.Module, batch: TokenBatch, *, max_tokens: int, temperatures: list[float]
) -> list[torch.Tensor]:
    """Log-probs (nats, float32, on the CPU) of all response tokens of ``batch`` at each temperature, on every rank."""
    tp_group = mpu.get_tensor_model_parallel_group()
    group = tp_group if tp_group.size() > 1 else None

    def score(
        micro: TokenBatch, packed: PackedMicroBatch, logits_RV: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scores = [token_logprobs(logits_RV, packed.target_ids_R, temperature=t, group=group) for t in temperatures]
        whole = torch.zeros(len(temperatures), packed.response_tokens, device=logits_RV.device)
        whole[:, packed.place_R] = torch.stack(scores).float()
        return logits_RV.new_zeros(()), {"logprobs": whole}

    plan = split(batch, max_tokens=max_tokens)
    results = run(model, batch, plan, score, forward_only=True)
    result_KT = torch.zeros(len(temperatures), sum(batch.response_lengths), device=_device())
    if mpu.is_pipeline_last_stage():
        offsets = torch.tensor([0, *batch.response_lengths]).cumsum(0).tolist()
        for indices, outputs in zip(plan, results, strict=True):
            index_T = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in indices])
            result_KT[:, index_T] = outputs["logprobs"]
        if mpu.get_context_parallel_world_size() > 1:  # each rank holds the tokens that its positions predict
            dist.all_reduce(result_KT, group=mpu.get_context_parallel_group())
    from_last_stage(result_KT)
    return list(result_KT.cpu())


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
        device=_device(),
    )


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
