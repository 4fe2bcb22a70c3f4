"""The student as a Hugging Face folder, at save time (``--save-hf``): weights, config, tokenizer.

All ranks take part, tensor by tensor: each is gathered, written by rank 0 and let go. What is exported is what a
rollout engine gets: with low-rank adapters, the base with the adapters merged into it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from opd.megatron_backend.checkpoint import together
from opd.megatron_backend.checkpoint_layout import TEMPORARY, CheckpointError, copy_hf_files
from opd.megatron_backend.safetensors_stream import INDEX, SafetensorsStream, name_files


def export_hf(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, *, origin: Path, max_file_bytes: int) -> None:
    """Writes a model for ``AutoModelForCausalLM.from_pretrained(folder)``; the folder appears complete, or replaces an
    earlier export file by file. Other files in it stay.

    Args:
        weights: Hugging Face names and whole tensors, on every rank; each tensor is used before the next is asked for.
        origin: where config and tokenizer come from.

    Raises:
        CheckpointError: on every rank, when rank 0 could not write. Nothing of the export is left.
    """
    leader = dist.get_rank() == 0
    temporary = folder.with_name(TEMPORARY + folder.name)
    try:
        together((lambda: begin_folder(temporary)) if leader else None)
        reason = _write(weights, temporary, max_file_bytes=max_file_bytes, origin=origin, leader=leader)
        together((lambda: _raise(reason)) if leader else None)
        together((lambda: put_in_place(temporary, folder)) if leader else None)
    except CheckpointError as error:
        if leader:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"could not export the student to `{folder}`: {error}. Free space or choose another --save-hf."
        ) from error


def begin_folder(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def _write(
    weights: Iterable[tuple[str, torch.Tensor]], folder: Path, *, max_file_bytes: int, origin: Path, leader: bool
) -> OSError | None:
    """Every rank goes through all weights, also when rank 0 can write no more: the others wait in the same gathers."""
    failure: OSError | None = None
    dtype: torch.dtype | None = None
    stream = SafetensorsStream(folder, max_file_bytes=max_file_bytes)
    for name, tensor in weights:
        if leader and failure is None:
            dtype = dtype or tensor.dtype
            try:
                stream.write(name, tensor)
            except OSError as error:
                failure = error
    if leader and failure is None:
        try:
            stream.close()
            name_files(folder, stream.files)
            copy_hf_files(origin, folder)
            state_dtype(folder / "config.json", dtype)
        except OSError as error:
            failure = error
    return failure


def _raise(error: OSError | None) -> None:
    if error is not None:
        raise error


def put_in_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    remove_weights(folder)
    # The index last: while it is not there, nobody takes half of the files for a model.
    for file in sorted(temporary.iterdir(), key=lambda path: path.name == INDEX):
        if file.is_dir():
            shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
        else:
            file.replace(folder / file.name)
    shutil.rmtree(temporary)


def remove_weights(folder: Path) -> None:
    """Of an earlier model: what of it the new one does not replace would be loaded with it."""
    for stale in [folder / INDEX, *folder.glob("*.safetensors")]:
        stale.unlink(missing_ok=True)


def state_dtype(config_file: Path, dtype: torch.dtype | None) -> None:
    """transformers loads weights in the dtype that config.json states: state the one they have."""
    config = json.loads(config_file.read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        config[key] = name
        config_file.write_text(json.dumps(config, indent=2) + "\n")
