"""A process group of the trainer's rank 0 and the workers of one SGLang server, for broadcasting weights to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

logger = logging.getLogger(__name__)

JOIN_SECONDS = 120.0
POLL_SECONDS = 0.0005


class UpdateGroup:
    """Rank 0 of the group. The constructor waits until all other ranks have joined.

    It stands beside the trainer's own groups, which know nothing of the server: torch has no public call for a group
    with processes that are outside of the default one, so this builds it as the servers do.

    Args:
        world_size: tensor-parallel ranks of the server, and one.

    Raises:
        RuntimeError: somebody did not join in time.
    """

    def __init__(self, *, host: str, port: int, world_size: int, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        timeout = timedelta(seconds=JOIN_SECONDS)
        # Not by ``rendezvous``: under torchrun it takes every address for one where torchrun hosts the store.
        store = dist.TCPStore(host, port, world_size, is_master=True, multi_tenant=True, timeout=timeout)
        self._group, _ = distributed_c10d._new_process_group_helper(
            world_size,
            0,
            [],
            dist.Backend(backend_of(device)),
            dist.PrefixStore(name, store),
            group_name=name,
            timeout=timeout,
        )
        distributed_c10d._world.pg_group_ranks[self._group] = {i: i for i in range(world_size)}

    def broadcast(self, flat: torch.Tensor, *, give_up: Callable[[], bool]) -> bool:
        """Sends ``flat``; False when ``give_up`` said so before everybody had it.

        Raises:
            RuntimeError: a connection broke.
        """
        work = dist.broadcast(flat.to(self.device), src=0, group=self._group, async_op=True)
        while not work.is_completed():
            if give_up():
                return False
            time.sleep(POLL_SECONDS)
        work.wait()
        return True

    def close(self) -> None:
        """Leaves the group. The others need not be alive."""
        if self._group is None:
            return
        group, self._group = self._group, None
        try:
            dist.destroy_process_group(group)
        except RuntimeError as error:
            logger.debug("the group %s did not end cleanly: %s", self.name, error)


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def flat_bucket(bucket: list[tuple[str, torch.Tensor]]) -> tuple[dict[str, Any], torch.Tensor]:
    """(names, dtypes and shapes as SGLang's "flattened_bucket" wants them, all bytes of the tensors in a row)."""
    # No padding between tensors: wide types first keep every one of them aligned.
    ordered = sorted(bucket, key=lambda item: -item[1].element_size())
    described = {
        "names": [name for name, _ in ordered],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
        "shapes": [list(tensor.shape) for _, tensor in ordered],
        "load_format": "flattened_bucket",
    }
    return described, torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8) for _, tensor in ordered])
