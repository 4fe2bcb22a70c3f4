"""What each rank of the layout tests does: all layouts in one launch, for starting a process costs most of the time."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import torch

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
    "dp2": {},
}


def run_layouts(folder: str, checkpoints: str, ports: list[int]) -> dict[str, dict[str, Any]]:
    """For each layout: this rank's logits and all gradients against transformers (largest differences), the weights
    after two steps, and a checkpoint from after the first under ``checkpoints/LAYOUT``."""
    from opd.megatron_backend import device

    rank_device = device.install()
    from opd.megatron_backend import checkpoint, groups

    torch.set_num_threads(1)
    results = {}
    for (name, layout), port in zip(LAYOUTS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        sizes = groups.ParallelSizes(**{k: layout[k] for k in ("tp", "pp", "cp") if k in layout})
        groups.init_distributed(sizes, device=rank_device, timeout_minutes=1)
        results[name] = _run_layout(
            Path(folder), sizes, layout.get("sequence_parallel", False), Path(checkpoints) / name
        )
        if name == "tp2":
            results[name]["full_disk"] = _save_to_a_full_disk(Path(folder), sizes, Path(checkpoints) / name, checkpoint)
        groups.shutdown()
    return results


def _run_layout(folder: Path, sizes: Any, sequence_parallel: bool, checkpoint_dir: Path) -> dict[str, Any]:
    from megatron.core import parallel_state as mpu

    from opd.megatron_backend import checkpoint
    from tests.dist.model_step import LENGTHS, Training, gather_vocab, own_part, transformers_reference

    # At 64 x tp the padded vocabulary differs between layouts, as it does in practice.
    training = Training(folder, sizes, sequence_parallel=sequence_parallel, pad_vocab_to=64)
    reference_logits, reference_gradients = transformers_reference(folder)
    vocab = reference_logits[0].size(-1)

    logits = training.forward_backward()
    logits_diff = 0.0
    if mpu.is_pipeline_last_stage():
        got = gather_vocab(torch.cat(logits))[:, :vocab]
        members = [[0], [1, 2]][mpu.get_data_parallel_rank()] if mpu.get_data_parallel_world_size() > 1 else [0, 1, 2]
        want = torch.cat([own_part(reference_logits[i]) for i in members])
        logits_diff = (got - want).abs().max().item()
    gradients = {}
    # Over data- and context-parallel ranks the distributed optimizer leaves each its own shard of the sum only.
    if mpu.get_data_parallel_world_size(with_context_parallel=True) == 1:
        got_gradients = training.gradients()
        gradients = {n: (g - reference_gradients[n]).abs().max().item() for n, g in got_gradients.items()}
    norm = training.step()
    checkpoint.save(checkpoint_dir, 1, model=training.ddp, optimizer=training.optimizer, with_rng=True, extra={"n": 1})
    training.step()
    reference_norm = torch.stack([g.norm() for g in reference_gradients.values()]).norm().item()
    return {
        "logits": logits_diff,
        "gradients": gradients,
        "norm_ratio": norm / reference_norm,
        "tokens": sum(LENGTHS),
        "weights_after_two_steps": training.weights(),
    }


def _save_to_a_full_disk(folder: Path, sizes: Any, checkpoint_dir: Path, checkpoint: Any) -> dict[str, Any]:
    """Rank 1 alone may not write files over 1 kB; both ranks must hear of it."""
    from tests.dist.model_step import Training

    training = Training(folder, sizes)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        checkpoint.save(checkpoint_dir, 2, model=training.ddp)
        message = ""
    except checkpoint.CheckpointError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return {"message": message, "latest": checkpoint.latest_iteration(checkpoint_dir)}
