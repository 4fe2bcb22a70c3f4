"""Save and load in Megatron's distributed format, whatever the parallel layout of either side.

The layout of the folder is in ``checkpoint_layout``. What a checkpoint folder holds:

- ``.metadata``, ``*.distcp``: weights and optimizer state as sharded tensors, keyed as megatron-core keys them;
- ``common.pt``: what is equal on every rank (optimizer parameter groups, scheduler), plain containers and tensors;
  with low-rank adapters, whose rank, scale and place it states, the tensors are the adapters alone;
- ``rng_RANK.pt``: generator states, restored only in the layout that wrote them;
- ``extra.json``: the caller's own state.

No file is unpickled freely: torch loads ``common.pt``, the generator states and the tensors with ``weights_only``, and
``.metadata``, which torch unpickles, is first read by an unpickler that knows its handful of classes.
"""

from __future__ import annotations

import enum
import io
import json
import logging
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel import random as megatron_random
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as torch_save_sharded

from opd.megatron_backend.adapter_checkpoint import adapter_parts, check_adapters, trainable_state
from opd.megatron_backend.checkpoint_layout import (
    CheckpointError,
    DirectoryWriter,
    Iteration,
    folder_name,
    hf_files,
    latest_iteration,
    resolve,
    write_hf_files,
)
from opd.megatron_backend.hf_bridge import bridged_model, clear_padded_rows

__all__ = [
    "CheckpointError", "Iteration", "Loaded", "hf_files", "latest_iteration", "load", "resolve", "save",
    "weights_dtype", "write_hf_files",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Optimizer state is stored per parameter, so that any layout can load it.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}

_EXTRA_STATE = "_extra_state"


class Scheduler(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


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
    """Writes one checkpoint and makes it the latest; all ranks take part and return when it is in place.

    Args:
        optimizer: a megatron-core optimizer, distributed or not.
        extra: JSON-able; rank 0's is written.

    Raises:
        CheckpointError: on every rank, when any rank could not write (disk full, no permission). What was written is
            removed, and the previous checkpoint stays the latest.
    """
    rank = dist.get_rank()
    writer = DirectoryWriter(directory, iteration)
    # A mistake in ``extra`` must show before anything is written.
    extra_text = json.dumps(extra or {}, indent=1)
    parts: dict[str, Any] = {"iteration": 0 if iteration == "release" else iteration, "checkpoint_version": 3.0}
    parts["content_metadata"] = dict(_METADATA)
    parts |= adapter_parts(model)
    parts |= _sharded_parts(model, optimizer, is_loading=False)
    if scheduler is not None:
        parts["opt_param_scheduler"] = scheduler.state_dict()
    sharded, common = save_preprocess(parts)

    def write_common() -> None:
        buffer = io.BytesIO()  # torch.save into a file turns a full disk into an unspecific RuntimeError
        torch.save(common, buffer)
        (writer.temporary / "common.pt").write_bytes(buffer.getbuffer())
        (writer.temporary / "extra.json").write_text(extra_text)

    def write_format() -> None:
        save_config(CheckpointingConfig("torch_dist"), str(writer.temporary))

    def write_rng() -> None:
        buffer = io.BytesIO()
        torch.save({"layout": _layout(), "states": _rng_states()}, buffer)
        (writer.temporary / _rng_file(rank)).write_bytes(buffer.getbuffer())

    try:
        _together(writer.begin if rank == 0 else None)
        _together(write_common if rank == 0 else None)
        _together(write_rng if with_rng else None)
        _write_sharded(sharded, writer.temporary)
        # Its presence says that the tensors are complete; Megatron reads the format from it.
        _together(write_format if rank == 0 else None)
        _together(writer.commit if rank == 0 else None)
    except CheckpointError as error:
        if rank == 0:
            writer.abort()
        previous = latest_iteration(directory) if Path(directory).is_dir() else None
        kept = "there is no earlier checkpoint" if previous is None else f"step {previous} stays the latest"
        raise CheckpointError(
            f"could not save step {iteration} to `{directory}`: {error}; {kept}. Free space or choose another --save."
        ) from error
    return Path(directory) / folder_name(iteration)


def load(
    directory: str | Path,
    *,
    model: torch.nn.Module,
    optimizer: Any | None = None,
    scheduler: Scheduler | None = None,
    with_rng: bool = False,
    step: Iteration | None = None,
) -> Loaded:
    """Loads a checkpoint into objects that are built already; all ranks take part.

    Without ``optimizer`` only weights are read. An optimizer that was just built gets the saved state; if it keeps fp32
    main parameters and the checkpoint has none, call its ``reload_model_params`` after this.

    Raises:
        CheckpointError: no such checkpoint, another model, or a part that was never saved.
    """
    path = resolve(directory, step)
    _check_metadata(path)
    adapted = check_adapters(path, model)
    parts = _sharded_parts(model, optimizer, is_loading=True)
    try:
        state = dist_checkpointing.load(parts, str(path))
    except (CheckpointingException, CheckpointException, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"checkpoint `{path}` does not fit this model{' and optimizer' if optimizer is not None else ''}: "
            f"{_first_line(error)}"
        ) from error
    inner = bridged_model(model)
    unused = {key: None for key in inner.state_dict() if key.endswith(_EXTRA_STATE)}
    # All that was asked for is there, or the load would have failed; with adapters the frozen base stays as it is.
    inner.load_state_dict(state["model"] | unused, strict=not adapted)
    clear_padded_rows(model)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    if scheduler is not None:
        if "opt_param_scheduler" not in state:
            raise CheckpointError(f"checkpoint `{path}` holds no scheduler state: load it as weights (--finetune)")
        scheduler.load_state_dict(state["opt_param_scheduler"])
    if with_rng:
        _restore_rng(path)
    extra = path / "extra.json"
    return Loaded(
        iteration="release" if path.name.endswith("release") else int(state.get("iteration", 0)),
        path=path,
        extra=json.loads(extra.read_text()) if extra.is_file() else {},
    )


def weights_dtype(path: str | Path) -> torch.dtype:
    """The dtype in which a checkpoint's weights were saved. ``path``: a folder that ``resolve`` returned.

    Raises:
        CheckpointError: no readable index.
    """
    _check_metadata(Path(path))
    check_adapters(Path(path), None)
    tensors = dist_checkpointing.load_tensors_metadata(str(path))
    return tensors["embedding.word_embeddings.weight"].dtype


def _sharded_parts(model: torch.nn.Module, optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    parts: dict[str, Any] = {"model": trainable_state(model, dict(_METADATA))}
    if optimizer is not None:
        if is_loading:
            # The distributed optimizer loads into its state tensors, which torch's Adam makes at the first step.
            for each in getattr(optimizer, "chained_optimizers", [optimizer]):
                if hasattr(each, "_init_optimizer_states_with_dummy_values"):
                    each._init_optimizer_states_with_dummy_values()
        parts["optimizer"] = optimizer.sharded_state_dict(
            parts["model"], is_loading=is_loading, metadata=dict(_METADATA)
        )
    if is_loading:
        # Transformer Engine's fp8 scales: nothing in bf16 or fp32, and torch would unpickle them freely.
        parts["model"] = {key: value for key, value in parts["model"].items() if not key.endswith(_EXTRA_STATE)}
    return parts


def _write_sharded(sharded: dict[str, Any], folder: Path) -> None:
    """megatron-core's ``torch_dist`` format, written by torch's own writer in this process.

    megatron-core's writer hands the data to forked processes through a manager process that re-imports the main module:
    4 to 8 seconds at the first save of a tiny model, a process left over when the trainer is killed, and a hang when
    ``psutil`` is missing. The files are the same.
    """
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    try:
        torch_save_sharded(
            mcore_to_pyt_state_dict(by_key, False),
            # One thread: an error of a second one would be printed by it and be lost to us.
            storage_writer=FileSystemWriter(folder, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    except CheckpointException as failure:  # raised on every rank
        reasons = "; ".join(f"rank {rank}: {_reason(error)}" for rank, (error, _) in failure.failures.items())
        raise CheckpointError(reasons) from failure


def _reason(error: BaseException) -> str:
    if "inline_container" in str(error):  # what torch's file writer says of a short write, instead of the OSError
        return f"a file could not be written whole, as when the disk is full ({error})"
    return str(error)


def _together(action: Callable[[], object] | None) -> None:
    """Runs the action on the ranks that have one and waits for all.

    Raises:
        CheckpointError: on every rank, when it failed on any.
    """
    reason = None
    try:
        if action is not None:
            action()
    except OSError as error:
        reason = str(error)
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text is not None]
    if failed:
        raise CheckpointError("; ".join(failed))


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of torch's checkpoint index and nothing that acts."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
    _NAMES = {
        ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("builtins", "set"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("collections", "OrderedDict"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("pathlib", "Path"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        plain = "." not in name  # a dotted name would reach through a class to what it imports
        if plain and (is_dtype or module in self._MODULES or (module, name) in self._NAMES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"`{module}.{name}` has no place in a checkpoint index")


def _enum_member(owner: Any, name: Any) -> enum.Enum:
    """In place of ``getattr``, by which the first releases of Python 3.11 pickle a member of an enum."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__):
        raise pickle.UnpicklingError(f"`{name}` of `{owner}` has no place in a checkpoint index")
    return owner[name]


def _check_metadata(path: Path) -> None:
    """Raises CheckpointError when the index is missing, broken, or would run code if torch unpickled it."""
    try:
        with (path / ".metadata").open("rb") as file:
            _MetadataUnpickler(file).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"`{path}` is no torch_dist checkpoint: it has no .metadata") from error
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise CheckpointError(f"`{path}/.metadata` is damaged or not to be trusted: {error}") from error


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0][:300]


def _layout() -> str:
    return (
        f"world={dist.get_world_size()} tp={mpu.get_tensor_model_parallel_world_size()} "
        f"pp={mpu.get_pipeline_model_parallel_world_size()} cp={mpu.get_context_parallel_world_size()}"
    )


def _rng_file(rank: int) -> str:
    return f"rng_{rank:05d}.pt"


def _rng_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),  # the CPU generator again where there is no CUDA
        "tracker": dict(megatron_random.get_cuda_rng_tracker().get_states()),
    }


def _restore_rng(path: Path) -> None:
    file = path / _rng_file(dist.get_rank())
    if not file.is_file():
        logger.warning("checkpoint `%s` holds no RNG state for this rank: generators keep their seeds", path)
        return
    saved = torch.load(file, weights_only=True)
    if saved["layout"] != _layout():
        logger.warning("RNG states of `%s` are of layout %s: generators keep their seeds", path, saved["layout"])
        return
    states = saved["states"]
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    megatron_random.get_cuda_rng_tracker().set_states(states["tracker"])
