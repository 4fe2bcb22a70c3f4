"""The two conversions between a Hugging Face folder and Megatron's format, tensor by tensor.

A process holds no more than one parameter at a time, read from one format and written to the other: the model is built
without memory for its weights, and says what each of them is called and where it belongs. Several processes (a
Megatron world without model parallelism) share out the parameters.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from safetensors import safe_open
from transformers import PretrainedConfig

from opd.megatron_backend import checkpoint, hf_bridge
from opd.megatron_backend.checkpoint_layout import TEMPORARY, CheckpointError, copy_hf_files
from opd.megatron_backend.groups import ParallelSizes
from opd.megatron_backend.hf_export import begin_folder, put_in_place, state_dtype
from opd.megatron_backend.moe import grouped_names
from opd.megatron_backend.optimizer_state import METADATA
from opd.megatron_backend.safetensors_stream import SafetensorsStream, name_files
from opd.megatron_backend.snapshot import weights_alone
from opd.megatron_backend.torch_dist_files import Piece, TensorFiles, pieces_of, tensor_piece


@dataclass(frozen=True, kw_only=True)
class Converted:
    path: Path
    dtype: torch.dtype
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a Megatron model that has no memory for it.

    Attributes:
        sharded: its place in a ``torch_dist`` checkpoint; a factory where it is stored in several parts.
        bridge_name: what mbridge calls it.
        hf_names: the Hugging Face tensors that it consists of.
    """

    sharded: ShardedTensor | ShardedTensorFactory
    bridge_name: str
    hf_names: list[str]

    @property
    def num_elements(self) -> int:
        return self.sharded.data.numel()

    def stored(self) -> Any:
        """The ``ShardedTensor`` objects it is stored as, in a list or a dict."""
        return _built(self.sharded)


def hf_to_torch_dist(
    source: Path,
    target: Path,
    *,
    max_file_bytes: int | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None],
) -> Converted:
    """Writes ``target/release`` and ``target/hf``. Weights keep their bits. All ranks of the world take part.

    Raises:
        FileNotFoundError, UnsupportedModelError: a folder that holds no model, or another one than it says.
        CheckpointError: it could not be written.
    """
    say(f"loading {source}")
    config = hf_bridge.read_hf_config(source, trust_remote_code=trust_remote_code)
    dtype = hf_bridge.hf_weights_dtype(source)
    model, parameters = _without_weights(config, dtype)
    reader = _HuggingFaceReader(source, model, dtype)
    reader.check(parameters)
    say(f"writing {target}")
    leader = dist.get_rank() == 0
    checkpoint.together((lambda: checkpoint.write_hf_files(source, target)) if leader else None)
    pieces = [piece for parameter in _share(parameters) for piece in reader.pieces(parameter)]
    state = model.sharded_state_dict(metadata=dict(METADATA)).values()
    pieces += pieces_of([each for each in state if isinstance(each, ShardedObject)])  # what layers keep beside weights
    path = weights_alone(target, pieces).write(max_file_bytes=max_file_bytes)
    return Converted(path=path, dtype=dtype, num_parameters=sum(p.num_elements for p in parameters))


def torch_dist_to_hf(
    source: Path,
    origin: Path,
    target: Path,
    *,
    max_file_bytes: int = 5_000_000_000,
    trust_remote_code: bool = False,
    say: Callable[[str], None],
) -> Converted:
    """``source``: one iteration's folder; ``origin``: where config and tokenizer come from. Replaces a model in
    ``target`` and leaves other files there alone. All ranks of the world take part.

    Raises:
        CheckpointError: a checkpoint that cannot be read or is of another model, or a folder that cannot be written.
    """
    say(f"loading {source}")
    config = hf_bridge.read_hf_config(origin, trust_remote_code=trust_remote_code)
    dtype = checkpoint.weights_dtype(source)  # refuses adapters, and an index that is not to be trusted
    files = TensorFiles(source)
    model, parameters = _without_weights(config, dtype)
    _check_stored(files, parameters, source, origin)
    say(f"writing {target}")
    temporary = target.with_name(TEMPORARY + target.name)
    try:
        _write_hf(files, model, parameters, temporary, target, origin=origin, max_file_bytes=max_file_bytes)
    except CheckpointError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"could not write `{target}`: {error}. Free space or choose another folder.") from error
    return Converted(path=target, dtype=dtype, num_parameters=sum(p.num_elements for p in parameters))


def _write_hf(
    files: TensorFiles,
    model: hf_bridge.BridgedModel,
    parameters: list[Parameter],
    temporary: Path,
    target: Path,
    *,
    origin: Path,
    max_file_bytes: int,
) -> None:
    leader = dist.get_rank() == 0
    checkpoint.together((lambda: begin_folder(temporary)) if leader else None)
    stream = SafetensorsStream(temporary, max_file_bytes=max_file_bytes, shard=dist.get_rank())

    def write_share() -> None:
        for parameter in _share(parameters):
            for name, tensor in _as_hf(files, parameter, model):
                stream.write(name, tensor)
        stream.close()

    def complete() -> None:
        name_files(temporary, [file for of_rank in found for file in of_rank])
        copy_hf_files(origin, temporary)
        state_dtype(temporary / "config.json", parameters[0].sharded.data.dtype)
        put_in_place(temporary, target)

    checkpoint.together(write_share)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, stream.files)
    checkpoint.together(complete if leader else None)


def _without_weights(config: PretrainedConfig, dtype: torch.dtype) -> tuple[hf_bridge.BridgedModel, list[Parameter]]:
    """A whole model on no device, and its parameters in the order of its layers."""
    config = copy.deepcopy(config)
    # Frequencies are computed when a model is built, which takes a device, and are in neither format.
    config.rope_parameters = {"rope_theta": 10000.0, "rope_type": "default"}
    with torch.device("meta"):
        model = hf_bridge.build_model(config, ParallelSizes(), dtype=dtype)
    bridge_names = dict(zip(model.state_dict(), grouped_names(model).state_dict(), strict=True))
    parameters = []
    for name, sharded in model.sharded_state_dict(metadata=dict(METADATA)).items():
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory):
            hf_names = model.bridge._weight_name_mapping_mcore_to_hf(bridge_names[name])
            parameters.append(Parameter(sharded=sharded, bridge_name=bridge_names[name], hf_names=hf_names))
    return model, parameters


def _share(parameters: list[Parameter]) -> list[Parameter]:
    """This rank's: a run of neighbours, so that files hold layers that belong together."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    total, before, mine = sum(p.num_elements for p in parameters), 0, []
    for parameter in parameters:
        if before * ranks // total == rank:
            mine.append(parameter)
        before += parameter.num_elements
    return mine


class _HuggingFaceReader:
    """Parameters from ``*.safetensors``. A file is open while a parameter is read from it, and no longer: what was read
    of a file that stays open counts as this process's memory."""

    def __init__(self, folder: Path, model: hf_bridge.BridgedModel, dtype: torch.dtype) -> None:
        self._folder, self._bridge, self._dtype = folder, model.bridge, dtype
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)
        self._last: tuple[str, list[torch.Tensor]] = ("", [])

    def check(self, parameters: list[Parameter]) -> None:
        """Raises UnsupportedModelError when a tensor that the config announces is in no file."""
        missing = [name for p in parameters for name in p.hf_names if name not in self._files]
        if missing:
            raise hf_bridge.UnsupportedModelError(
                f"the weights in `{self._folder}` are not those of its config.json: {', '.join(missing[:3])} "
                f"{'and others are' if len(missing) > 3 else 'is'} not there"
            )

    def pieces(self, parameter: Parameter) -> Iterator[Piece]:
        for number, stored in enumerate(nested_values(parameter.stored())):
            yield tensor_piece(stored, lambda n=number: self._parts(parameter)[n])

    def _parts(self, parameter: Parameter) -> list[torch.Tensor]:
        """The parts that it is stored in. Those of the last one are kept: they are written one after the other."""
        name, parts = self._last
        if name != parameter.bridge_name:
            self._last = ("", [])
            filled = replace(parameter.sharded, data=self._read(parameter))
            parts = [part.data for part in nested_values(_built(filled))]
            self._last = (parameter.bridge_name, parts)
        return parts

    def _read(self, parameter: Parameter) -> torch.Tensor:
        tensors = []
        for name in parameter.hf_names:
            with safe_open(self._files[name], framework="pt") as file:
                tensors.append(file.get_tensor(name).to(self._dtype))
        whole = self._bridge._weight_to_mcore_format(parameter.bridge_name, tensors)
        expected = parameter.sharded.data.shape
        if whole.shape != expected:
            raise hf_bridge.UnsupportedModelError(
                f"{', '.join(parameter.hf_names)} in `{self._folder}` have the shape {tuple(whole.shape)}; its "
                f"config.json announces {tuple(expected)}"
            )
        return whole


def _built(sharded: ShardedTensor | ShardedTensorFactory) -> Any:
    return sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]


def _as_hf(
    files: TensorFiles, parameter: Parameter, model: hf_bridge.BridgedModel
) -> Iterator[tuple[str, torch.Tensor]]:
    stored = parameter.stored()
    if isinstance(parameter.sharded, ShardedTensorFactory):
        whole = parameter.sharded.merge_fn(dict_list_map_outplace(files.read, stored))
    else:
        whole = files.read(stored[0])
    names, tensors = model.bridge._weight_to_hf_format(parameter.bridge_name, whole)
    yield from zip(names, tensors, strict=True)


def _check_stored(files: TensorFiles, parameters: list[Parameter], source: Path, origin: Path) -> None:
    """Raises CheckpointError unless the checkpoint holds the weights of the model that ``origin`` describes."""
    wanted = {stored.key: stored for p in parameters for stored in nested_values(p.stored())}
    others = {key for key in files.keys() if not key.startswith("optimizer.")} - wanted.keys()
    differing = [f"no `{key}`" for key in wanted if key not in files]
    differing += [f"`{key}`, which is not in that model" for key in sorted(others)]
    differing += [
        f"`{key}` of shape {tuple(files.shape(key))}, which is {tuple(stored.global_shape)} there"
        for key, stored in wanted.items()
        if key in files and not stored.allow_shape_mismatch and files.shape(key) != torch.Size(stored.global_shape)
    ]
    if differing:
        raise CheckpointError(
            f"checkpoint `{source}` does not fit the model that `{origin}` describes: it holds {differing[0]}"
            + (f" ({len(differing)} differences in all)." if len(differing) > 1 else ".")
        )
