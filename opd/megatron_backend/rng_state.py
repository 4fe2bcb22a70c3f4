"""Generator states of one rank: written into a checkpoint, and restored in the layout that wrote them.

With dropout refused, training draws no random numbers: sampling noise follows from (seed, sample index), new adapters
from the seed. So a run that goes on in another layout, where these states mean nothing, loses nothing by starting its
generators from the seed.
"""

from __future__ import annotations

import io
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import random as megatron_random

logger = logging.getLogger(__name__)


def rng_file(rank: int) -> str:
    return f"rng_{rank:05d}.pt"


def rng_bytes() -> bytes:
    """This rank's states, as they are now."""
    buffer = io.BytesIO()
    torch.save({"layout": _layout(), "states": _states()}, buffer)
    return buffer.getvalue()


def restore_rng(path: Path) -> None:
    """Restores what ``path`` holds for this rank and layout; in another layout the generators keep their seeds."""
    file = path / rng_file(dist.get_rank())
    saved = torch.load(file, weights_only=True) if file.is_file() else {"layout": None}
    if saved["layout"] != _layout():
        if dist.get_rank() == 0:
            wrote = saved["layout"] or "fewer ranks"
            logger.info(
                "generator states of `%s` are of another layout (%s, now %s): they start from --seed; training draws no"
                " random numbers", path, wrote, _layout(),
            )  # fmt: skip
        return
    states = saved["states"]
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    megatron_random.get_cuda_rng_tracker().set_states(states["tracker"])


def _layout() -> str:
    return (
        f"world={dist.get_world_size()} tp={mpu.get_tensor_model_parallel_world_size()} "
        f"pp={mpu.get_pipeline_model_parallel_world_size()} cp={mpu.get_context_parallel_world_size()}"
    )


def _states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),  # the CPU generator again where there is no CUDA
        "tracker": dict(megatron_random.get_cuda_rng_tracker().get_states()),
    }
