"""Process groups: how many ranks share a model in which way, and starting and stopping them.

Megatron's order of ranks (fastest first): tensor, context, data, pipeline; for the experts of a mixture of experts:
expert tensor, expert, expert data, pipeline.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from opd.cluster.interfaces import tell_gloo

FOREVER = datetime.timedelta(days=365)
_patient: list[dist.ProcessGroup] = []


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """Ranks that hold one copy of a model together, by what they split.

    The ranks of one pipeline stage hold its experts in a division of their own, by ``etp`` and ``ep``: a rank has one
    place in each of the two divisions.
    """

    tp: int = 1  # tensor-parallel ranks
    pp: int = 1  # pipeline stages
    cp: int = 1  # context-parallel ranks
    vpp: int = 1  # parts of the model on each pipeline stage (interleaved schedule)
    ep: int = 1  # ranks over which the experts of a layer are divided
    etp: int | None = None  # tensor-parallel ranks of one expert; ``tp`` without it

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
        expert_ranks = self.expert_tp * self.ep * self.pp
        if world_size % expert_ranks:
            raise ValueError(
                f"{world_size} training ranks do not divide into sets of experts of {expert_ranks} ranks "
                f"(--expert-tensor-parallel-size {self.expert_tp} x --expert-model-parallel-size {self.ep} x "
                f"--pipeline-model-parallel-size {self.pp}). Start a multiple of that, or lower one of them."
            )
        return copies

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp


def init_distributed(
    sizes: ParallelSizes, *, device: torch.device, seed: int = 1234, timeout_minutes: float = 10
) -> None:
    """Joins the world and builds Megatron's groups; seeds Megatron's RNG tracker.

    Reads ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` as torchrun sets them; without them this process
    is a world of one on a free loopback port. Call ``device.install`` first.

    Raises:
        ValueError: the world size does not fit ``sizes``.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    sizes.dp(world_size)
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT") or str(_free_port())
    if world_size > 1:
        tell_gloo(host)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    if world_size > 1:
        _patient.append(dist.new_group(backend="gloo", timeout=FOREVER))
    _make_groups(sizes, timeout_minutes)
    model_parallel_cuda_manual_seed(seed)


class Layout:
    """A second division of the same ranks into groups, for a model with other sizes than the student's.

    megatron-core keeps the groups in use in module variables, and its layers and schedules read them while they are
    built and while they run. ``in_use`` puts this division in their place for the length of a block.
    """

    def __init__(self, sizes: ParallelSizes, *, timeout_minutes: float = 10) -> None:
        """Makes the groups; every rank calls it. ``init_distributed`` ran before.

        Raises:
            ValueError: the world size does not fit ``sizes``.
        """
        sizes.dp(dist.get_world_size())
        self.sizes = sizes
        before = _groups_in_use()
        _use_groups({name: {} if isinstance(value, dict) else None for name, value in before.items()})
        try:
            _make_groups(sizes, timeout_minutes)
            self._groups = _groups_in_use()
        finally:
            _use_groups(before)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Every rank enters and leaves it together."""
        before = _groups_in_use()
        _use_groups(self._groups)
        try:
            yield
        finally:
            _use_groups(before)


def patient_group() -> dist.ProcessGroup:
    """All ranks, on the host, without a time-out: for waiting until one of them has written a rollout. One that is gone
    is noticed all the same, by its connections. Not there in a world of one."""
    return _patient[0]


def shutdown() -> None:
    """Leaves the world. Safe to call twice, or before ``init_distributed``."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state as mpu

    _patient.clear()
    mpu.destroy_model_parallel()
    dist.destroy_process_group()


def _make_groups(sizes: ParallelSizes, timeout_minutes: float) -> None:
    from megatron.core import parallel_state as mpu

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        context_parallel_size=sizes.cp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )


def _groups_in_use() -> dict[str, Any]:
    """megatron-core's module variables: groups, and the sizes and ranks that go with them. All start as None or {}."""
    from megatron.core import parallel_state as mpu

    return {name: value for name, value in vars(mpu).items() if name.startswith("_") and name.isupper()}


def _use_groups(groups: dict[str, Any]) -> None:
    from megatron.core import parallel_state as mpu

    vars(mpu).update(groups)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
