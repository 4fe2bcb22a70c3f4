"""The files of Megatron's ``torch_dist`` format: tensors cut into pieces, each in one rank's ``*.distcp`` file.

The format is that of ``torch.distributed.checkpoint``, whose index (``.metadata``) says in which file, at which place,
which region of which tensor is. Writing is planned by all ranks together and then done by each alone, one piece at a
time; reading any region takes one process and memory for that region. torch's own writer holds on to every tensor of
a file until the file is complete, and an error of a rank reaches the others as a traceback.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedStateDict, ShardedTensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult


@dataclass(frozen=True)
class Piece:
    """A region of a tensor, or an object, that some rank writes.

    Attributes:
        read: gives the region's values, or the object's bytes, when they are written.
    """

    item: WriteItem
    read: Callable[[], torch.Tensor | io.BytesIO]


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    pieces: list[Piece]  # this rank's, in writing order
    metadata: Metadata | None  # rank 0's: the index, still without places


def pieces_of(sharded: ShardedStateDict) -> list[Piece]:
    """What this rank could write of a state that ``save_preprocess`` has prepared."""
    return [_piece(base) for base in nested_values(sharded)]


def tensor_piece(sharded: ShardedTensor, read: Callable[[], torch.Tensor]) -> Piece:
    """``read`` gives a tensor of ``sharded.local_shape``; axes are put before it as the format has them."""
    sizes = torch.Size((1,) * sharded.prepend_axis_num + tuple(sharded.local_shape))
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=torch.Size(sharded.global_offset), sizes=sizes),
        properties=TensorProperties(dtype=sharded.dtype),
        size=torch.Size(sharded.global_shape),
    )
    index = MetadataIndex(sharded.key, torch.Size(sharded.global_offset))
    return Piece(
        WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data), lambda: read().detach().reshape(sizes)
    )


def _piece(base: ShardedBase) -> Piece:
    if isinstance(base, ShardedTensor):
        return tensor_piece(base, lambda: base.data)
    if not isinstance(base, ShardedObject):
        raise TypeError(f"{type(base).__name__} is no part of a sharded state")
    buffer = io.BytesIO()
    torch.save([base.data], buffer)
    return Piece(WriteItem(index=MetadataIndex(base.unique_key), type=WriteItemType.BYTE_IO), lambda: buffer)


def plan_files(pieces: list[Piece], group: dist.ProcessGroup | None = None) -> FilePlan:
    """Decides which rank writes what; all ranks take part. What several ranks hold is shared out among them.

    Raises:
        ValueError: on rank 0, when pieces overlap or leave a hole.
    """
    ranks = dist.get_world_size(group)
    gathered: list[list[WriteItem]] | None = [[] for _ in range(ranks)] if dist.get_rank(group) == 0 else None
    dist.gather_object([piece.item for piece in pieces], gathered, dst=0, group=group)
    metadata, plans = None, None
    if gathered is not None:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        plans, metadata = planner.create_global_plan([SavePlan(items) for items in gathered])
    mine: list[SavePlan | None] = [None]
    dist.scatter_object_list(mine, plans, src=0, group=group)
    read = {piece.item.index: piece.read for piece in pieces}
    return FilePlan(pieces=[Piece(item, read[item.index]) for item in mine[0].items], metadata=metadata)


def write_pieces(
    folder: Path, pieces: Iterable[Piece], *, rank: int, max_file_bytes: int | None = None
) -> list[WriteResult]:
    """Writes ``__RANK_N.distcp``, durably, and returns what the index says of them. Holds one piece at a time.

    Args:
        max_file_bytes: a file that has this many takes no further piece.

    Raises:
        OSError, RuntimeError: the disk is full, or the like.
    """
    results: list[WriteResult] = []
    remaining = iter(pieces)
    piece = next(remaining, None)
    number = 0
    while piece is not None:
        name = f"__{rank}_{number}.distcp"
        with (folder / name).open("wb") as file:
            while piece is not None and not (max_file_bytes is not None and file.tell() >= max_file_bytes):
                results.append(_write(piece, file, name))
                piece = next(remaining, None)
            file.flush()
            os.fsync(file.fileno())
        number += 1
    return results


def _write(piece: Piece, file: io.BufferedWriter, name: str) -> WriteResult:
    start = file.tell()
    value = piece.read()
    if isinstance(value, io.BytesIO):
        file.write(value.getbuffer())
    else:
        tensor = value.cpu().contiguous()
        # torch saves a tensor's whole storage, which may be that of a larger tensor.
        torch.save(tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone(), file)
    length = file.tell() - start
    return WriteResult(
        index=piece.item.index, size_in_bytes=length, storage_data=_StorageInfo(name, start, length, None)
    )


def write_index(folder: Path, metadata: Metadata, results: list[list[WriteResult]]) -> None:
    """Completes the index with the places of all ranks' pieces and writes it."""
    FileSystemWriter(folder).finish(metadata, results)


class TensorFiles:
    """Reads regions of a checkpoint's tensors. The index is unpickled: check it first (``checkpoint_index``)."""

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = metadata.state_dict_metadata

    def __contains__(self, key: str) -> bool:
        return isinstance(self._tensors.get(key), TensorStorageMetadata)

    def keys(self) -> Iterator[str]:
        return (key for key in self._tensors if key in self)

    def shape(self, key: str) -> torch.Size:
        return self._tensors[key].size

    def read(self, sharded: ShardedTensor) -> torch.Tensor:
        """The region that ``sharded`` describes, in its dtype, on the CPU. What the checkpoint has not is zero."""
        sizes = torch.Size((1,) * sharded.prepend_axis_num + tuple(sharded.local_shape))
        region = ChunkStorageMetadata(offsets=torch.Size(sharded.global_offset), sizes=sizes)
        target = torch.zeros(sizes, dtype=sharded.dtype, device="cpu")
        items = create_read_items_for_chunk_list(sharded.key, self._tensors[sharded.key], [region])
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target.view(sharded.local_shape)


class _Into(LoadPlanner):
    """Puts what is read into one tensor. The other methods of a planner are for plans of several ranks."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        region = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            region = region.narrow(dim, start, length)
        return region

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass  # read_data has copied into the region

    def set_up_planner(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("the plan is made already")

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner
