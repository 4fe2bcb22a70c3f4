"""Process groups: how many ranks share a model in which way, and starting and stopping them.

Megatron's order of ranks (fastest first): tensor, context, data, pipeline.
"""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    tp: int = 1  # tensor-parallel ranks
    pp: int = 1  # pipeline stages
    cp: int = 1  # context-parallel ranks

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.tp * self.pp * self.cp

    def dp(self, world_size: int) -> int:
        """Data-parallel size.

        Raises:
            ValueError: the ranks do not divide into whole model copies.
        """
        copies, rest = divmod(world_size, self.model_ranks)
        if rest or not copies:
            raise ValueError(
                f"{world_size} training ranks do not divide into model copies of {self.model_ranks} ranks "
                f"(--tensor-model-parallel-size {self.tp} x --pipeline-model-parallel-size {self.pp} x "
                f"--context-parallel-size {self.cp}). "
                "Start a multiple of that, or lower one of them."
            )
        return copies


def init_distributed(
    sizes: ParallelSizes, *, device: torch.device, seed: int = 1234, timeout_minutes: float = 10
) -> None:
    """Joins the world and builds Megatron's groups; seeds Megatron's RNG tracker.

    Reads ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` as torchrun sets them; without them this process
    is a world of one on a free loopback port. Call ``device.install`` first.

    Raises:
        ValueError: the world size does not fit ``sizes``.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    sizes.dp(world_size)
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT") or str(_free_port())
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        context_parallel_size=sizes.cp,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leaves the world. Safe to call twice, or before ``init_distributed``."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state as mpu

    mpu.destroy_model_parallel()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
