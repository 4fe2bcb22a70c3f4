"""A training step on a fixed pack of three sequences in whatever layout is up, and the same in plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.tiny_models import VOCAB_SIZE

LENGTHS = (20, 8, 16)  # multiples of 4: two context-parallel ranks cut each into four chunks
LEARNING_RATE = 1e-3


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=generator) for n in LENGTHS]


def targets() -> list[torch.Tensor]:
    return [tokens.roll(-1) for tokens in sequences()]  # the last predicts the first: any fixed target serves


def transformers_reference(folder: Path) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logits [L, V] of each sequence, and the gradient by weight name of the token-mean cross-entropy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = [model(tokens[None]).logits[0] for tokens in sequences()]
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets()))
    loss.backward()
    return [x.detach() for x in logits], {name: p.grad for name, p in model.named_parameters()}


class Training:
    """A model in the layout that is up, with megatron-core's DDP and optimizer. Context: ``init_distributed`` ran."""

    def __init__(self, folder: Path, sizes: Any, *, sequence_parallel: bool = False, pad_vocab_to: int = 1) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from opd.megatron_backend import hf_bridge

        self.model = hf_bridge.build_model(
            hf_bridge.read_hf_config(folder),
            sizes,
            dtype=torch.float32,
            sequence_parallel=sequence_parallel,
            make_vocab_size_divisible_by=pad_vocab_to,
        )
        hf_bridge.load_hf_weights(self.model, folder)
        config = self.model.config
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.ddp = DistributedDataParallel(config, ddp_config, self.model)
        optimizer_config = OptimizerConfig(
            optimizer="adam", lr=LEARNING_RATE, weight_decay=0.0, clip_grad=1.0, use_distributed_optimizer=True
        )
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.ddp])
        config.finalize_model_grads_func = finalize_model_grads

    def forward_backward(self) -> list[torch.Tensor]:
        """Accumulates gradients, each sequence a share of the micro-batches, and returns this rank's logits [T, V / tp]
        per micro-batch (last pipeline stage)."""
        from megatron.core import parallel_state as mpu
        from megatron.core.pipeline_parallel import get_forward_backward_func

        dp, dp_rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        # Data-parallel ranks take different sequences; a pipeline runs two micro-batches of different length.
        if dp > 1:
            packs = [[0], [1, 2]][dp_rank : dp_rank + 1]
        elif mpu.get_pipeline_model_parallel_world_size() > 1:
            packs = [[0], [1, 2]]
        else:
            packs = [[0, 1, 2]]
        logits: list[torch.Tensor] = []
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=partial(_forward_step, logits),
            data_iterator=iter(packs),
            model=[self.ddp],
            num_microbatches=len(packs),
            seq_length=sum(LENGTHS),
            micro_batch_size=1,
            forward_only=False,
        )
        return logits

    def step(self) -> float:
        """Returns the gradient norm before clipping."""
        self.forward_backward()
        ok, norm, _ = self.optimizer.step()
        assert ok
        return float(norm)

    def weights(self) -> dict[str, torch.Tensor]:
        from opd.megatron_backend.hf_bridge import export_hf_weights

        return {name: tensor.clone() for name, tensor in export_hf_weights(self.ddp)}

    def gradients(self) -> dict[str, torch.Tensor]:
        """By Hugging Face name: the export, with gradients in the weights' place for its duration."""
        saved = [p.data.clone() for p in self.model.parameters()]
        for p in self.model.parameters():
            p.data.copy_(p.main_grad)
        result = self.weights()
        for p, data in zip(self.model.parameters(), saved, strict=True):
            p.data.copy_(data)
        return result


def own_part(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """What this context-parallel rank holds of one sequence."""
    from megatron.core import parallel_state as mpu

    cp, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    if cp == 1:
        return tensor
    chunks = tensor.chunk(2 * cp, dim)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]], dim)


def gather_vocab(logits: torch.Tensor) -> torch.Tensor:
    from megatron.core import parallel_state as mpu

    group = mpu.get_tensor_model_parallel_group()
    shards = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, -1)


def _forward_step(logits: list[torch.Tensor], packs: Iterator[list[int]], model: torch.nn.Module) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    members = next(packs)
    lengths = [LENGTHS[i] for i in members]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    row = torch.cat([own_part(sequences()[i]) for i in members])[None]
    positions = torch.cat([own_part(torch.arange(n)) for n in lengths])[None]
    output = model(row, positions, None, packed_seq_params=packed)

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        logits.append(output[0].detach().clone())
        labels = torch.cat([own_part(targets()[i]) for i in members])
        # Megatron's cross-entropy works in place.
        losses = vocab_parallel_cross_entropy(output.transpose(0, 1).clone(), labels[:, None])
        return losses.sum(), torch.tensor(len(labels), dtype=torch.int), {}

    return output, loss
