"""The two conversions between a Hugging Face folder and Megatron's format, on the process groups that are up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict

from opd.megatron_backend import checkpoint, hf_bridge
from opd.megatron_backend.checkpoint_layout import copy_hf_files
from opd.megatron_backend.groups import ParallelSizes


@dataclass(frozen=True, kw_only=True)
class Converted:
    path: Path
    dtype: torch.dtype
    num_parameters: int


def hf_to_torch_dist(
    source: Path, target: Path, sizes: ParallelSizes, *, trust_remote_code: bool = False, say: Callable[[str], None]
) -> Converted:
    """Writes ``target/release`` and ``target/hf``. Weights keep their dtype and bits."""
    say(f"loading {source}")
    config = hf_bridge.read_hf_config(source, trust_remote_code=trust_remote_code)
    dtype = hf_bridge.hf_weights_dtype(source)
    model = hf_bridge.build_model(config, sizes, dtype=dtype)
    hf_bridge.load_hf_weights(model, source)
    say(f"writing {target}")
    if dist.get_rank() == 0:
        checkpoint.write_hf_files(source, target)
    path = checkpoint.save(target, "release", model=model)
    return Converted(path=path, dtype=dtype, num_parameters=sum(p.numel() for p in model.parameters()))


def torch_dist_to_hf(
    source: Path,
    origin: Path,
    target: Path,
    sizes: ParallelSizes,
    *,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    say: Callable[[str], None],
) -> Converted:
    """``source``: one iteration's folder; ``origin``: where config and tokenizer come from. Replaces a model in
    ``target`` and leaves other files there alone."""
    say(f"loading {source}")
    config = hf_bridge.read_hf_config(origin, trust_remote_code=trust_remote_code)
    dtype = checkpoint.weights_dtype(source)
    model = hf_bridge.build_model(config, sizes, dtype=dtype)
    checkpoint.load(source, model=model)
    say(f"writing {target}")
    # Clones: q, k and v (gate and up) come as views of one tensor.
    weights = {name: tensor.cpu().clone() for name, tensor in hf_bridge.export_hf_weights(model)}
    if dist.get_rank() == 0:
        target.mkdir(parents=True, exist_ok=True)
        for stale in [*target.glob("*.safetensors"), target / "model.safetensors.index.json"]:
            stale.unlink(missing_ok=True)
        copy_hf_files(origin, target)
        _state_dtype(target / "config.json", str(dtype).removeprefix("torch."))
        save_torch_state_dict(weights, target, max_shard_size=max_shard_size)
    dist.barrier()
    return Converted(path=target, dtype=dtype, num_parameters=sum(w.numel() for w in weights.values()))


def _state_dtype(config_file: Path, dtype: str) -> None:
    """transformers loads weights in the dtype that config.json states: state the one they have."""
    config = json.loads(config_file.read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != dtype:
        config[key] = dtype
        config_file.write_text(json.dumps(config, indent=2) + "\n")
