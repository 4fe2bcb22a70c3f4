"""Save and load in Megatron's distributed format, whatever the parallel layout of either side.

The layout of the folder is in ``checkpoint_layout``. What a checkpoint folder holds:

- ``.metadata``, ``*.distcp``: weights and optimizer state as sharded tensors, keyed as megatron-core keys them;
- ``common.pt``: what is equal on every rank (optimizer parameter groups, scheduler), plain containers and tensors;
  with low-rank adapters, whose rank, scale and place it states, the tensors are the adapters alone;
- ``rng_RANK.pt``: generator states, restored only in the layout that wrote them;
- ``extra.json``: the caller's own state.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from opd.megatron_backend.adapter_checkpoint import check_adapters, trainable_state
from opd.megatron_backend.checkpoint_index import check_index, read_common
from opd.megatron_backend.checkpoint_layout import (
    CheckpointError,
    Iteration,
    hf_files,
    latest_iteration,
    resolve,
    write_hf_files,
)
from opd.megatron_backend.hf_bridge import bridged_model, clear_padded_rows
from opd.megatron_backend.optimizer_state import METADATA, SavedOptimizer, give, wanted_tensors
from opd.megatron_backend.rng_state import restore_rng
from opd.megatron_backend.snapshot import Scheduler, Snapshot, take, together
from opd.megatron_backend.torch_dist_files import TensorFiles

__all__ = [
    "CheckpointError", "Iteration", "Loaded", "Snapshot", "hf_files", "latest_iteration", "load", "resolve", "save",
    "take", "together", "weights_dtype", "write_hf_files",
]  # fmt: skip

_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    iteration: Iteration
    path: Path
    extra: dict[str, Any]


def save(
    directory: str | Path,
    iteration: Iteration,
    *,
    model: torch.nn.Module,
    optimizer: Any | None = None,
    scheduler: Scheduler | None = None,
    with_rng: bool = False,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Takes a checkpoint and writes it: see ``take`` and ``Snapshot.write``."""
    snapshot = take(
        directory, iteration, model=model, optimizer=optimizer, scheduler=scheduler, with_rng=with_rng, extra=extra
    )
    return snapshot.write()


def load(
    directory: str | Path,
    *,
    model: torch.nn.Module,
    optimizer: Any | None = None,
    scheduler: Scheduler | None = None,
    with_rng: bool = False,
    step: Iteration | None = None,
) -> Loaded:
    """Loads a checkpoint, of whatever layout and kind of optimizer, into objects that are built already; all ranks take
    part. Without ``optimizer`` only weights are read.

    Raises:
        CheckpointError: no such checkpoint, another model, or a part that was never saved.
    """
    path = resolve(directory, step)
    check_index(path)
    common = read_common(path)
    adapted = check_adapters(path, model)
    model_state = trainable_state(model, dict(METADATA))
    # Transformer Engine's fp8 scales: nothing in bf16 or fp32, and torch would unpickle them freely.
    weights = {key: value for key, value in model_state.items() if not key.endswith(_EXTRA_STATE)}
    parts: dict[str, Any] = {"model": weights}
    saved = None if optimizer is None else SavedOptimizer.of(common, path)
    if saved is not None:
        parts["wanted"] = wanted_tensors(optimizer, model_state, saved)
    try:
        state = dist_checkpointing.load(parts, str(path))
        _fill(model, state["model"], strict=not adapted)
        if saved is not None:
            # A new description of the model: a load leaves its mark on the one it was given.
            model_state = trainable_state(model, dict(METADATA))
            give(optimizer, model_state, state.get("wanted", {}), saved, TensorFiles(path))
        elif optimizer is not None:
            optimizer.reload_model_params()
    except (CheckpointingException, CheckpointException, KeyError, pickle.UnpicklingError) as error:
        what = "this model" if optimizer is None else "this model and optimizer"
        raise CheckpointError(
            f"checkpoint `{path}` does not fit {what}, or is not whole: {_first_line(error).rstrip('.')}. Give the "
            "model flags that it was saved with, or another checkpoint: latest_checkpointed_iteration.txt has the "
            "number of the one to load."
        ) from error
    if scheduler is not None:
        if "opt_param_scheduler" not in common:
            raise CheckpointError(f"checkpoint `{path}` holds no scheduler state. Load its weights alone: --finetune.")
        scheduler.load_state_dict(common["opt_param_scheduler"])
    if with_rng:
        restore_rng(path)
    extra = path / "extra.json"
    return Loaded(
        iteration="release" if path.name.endswith("release") else int(common.get("iteration", 0)),
        path=path,
        extra=json.loads(extra.read_text()) if extra.is_file() else {},
    )


def _fill(model: torch.nn.Module, weights: dict[str, Any], *, strict: bool) -> None:
    """All that was asked for is there, or the load would have failed; with adapters the frozen base stays as it is."""
    inner = bridged_model(model)
    unused = {key: None for key in inner.state_dict() if key.endswith(_EXTRA_STATE)}
    inner.load_state_dict(weights | unused, strict=strict)
    clear_padded_rows(model)


def weights_dtype(path: str | Path) -> torch.dtype:
    """The dtype in which a checkpoint's weights were saved. ``path``: a folder that ``resolve`` returned.

    Raises:
        CheckpointError: no readable index.
    """
    check_index(Path(path))
    check_adapters(Path(path), None)
    tensors = dist_checkpointing.load_tensors_metadata(str(path))
    return tensors["embedding.word_embeddings.weight"].dtype


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0][:300]
