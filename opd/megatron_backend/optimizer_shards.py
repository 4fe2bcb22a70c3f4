"""State of the distributed optimizer: each rank writes, and reads, the part of it that it holds.

The optimizer divides the weights of a buffer, laid end to end, over the data-parallel ranks: a rank's part of one
weight is a run of its elements. In a checkpoint such a run is cut into boxes of the weight's shape, at most three for a
matrix: the end of a row, whole rows, the beginning of a row. megatron-core gathers the state of all data-parallel ranks
in the memory of each of them instead, 12 bytes a weight; what is written is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from opd.megatron_backend.torch_dist_files import Piece, TensorFiles, tensor_piece

STATE = "optimizer.state"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class _Box:
    """Elements ``run`` of this rank's state of ``parameter``, and where they are in the checkpoint (its key is the
    weight's)."""

    parameter: torch.nn.Parameter
    run: slice
    place: ShardedTensor


def shard_pieces(optimizer: DistributedOptimizer, model_state: ShardedStateDict) -> list[Piece]:
    """What this rank holds of main weights (``param``) and moments. The state is read when a piece is."""
    pieces = []
    for box in _boxes(optimizer, model_state):
        replicas = box.place.replica_id
        if isinstance(replicas, tuple) and any(replicas[:-1]):
            continue  # another tensor-parallel rank or pipeline stage writes it; the last number is the data rank's
        held = optimizer._get_main_param_and_optimizer_states(box.parameter)
        for name in ("param", *MOMENTS):
            place = replace(box.place, key=f"{STATE}.{name}.{box.place.key}")
            pieces.append(tensor_piece(place, lambda tensor=held[name], run=box.run: tensor[run]))
    return pieces


def read_shards(
    optimizer: DistributedOptimizer, model_state: ShardedStateDict, files: TensorFiles, *, main_weights: str | None
) -> None:
    """Fills this rank's part, whose tensors are there already. No other rank takes part.

    Args:
        main_weights: under which name the checkpoint holds fp32 main weights; None: the weights themselves are.

    Raises:
        KeyError: the checkpoint lacks a tensor.
    """
    for boxes in _by_parameter(_boxes(optimizer, model_state)):
        parameter = boxes[0].parameter
        held = optimizer._get_main_param_and_optimizer_states(parameter)
        read = {name: torch.empty_like(held[name], device="cpu") for name in ("param", *MOMENTS)}
        for box in boxes:
            for name, target in read.items():
                stored = main_weights if name == "param" else name
                key = box.place.key if stored is None else f"{STATE}.{stored}.{box.place.key}"
                target[box.run] = files.read(replace(box.place, key=key)).flatten()
        optimizer._set_main_param_and_optimizer_states(parameter, read)


def _by_parameter(boxes: Iterator[_Box]) -> Iterator[list[_Box]]:
    group: list[_Box] = []
    for box in boxes:
        if group and box.parameter is not group[0].parameter:
            yield group
            group = []
        group.append(box)
    if group:
        yield group


def _boxes(optimizer: DistributedOptimizer, model_state: ShardedStateDict) -> Iterator[_Box]:
    entries, _ = extract_sharded_tensors_and_factories(model_state)
    by_parameter = {id(entry.data): entry for entry in nested_values(entries)}
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    own = ranges["param"]
                    yield from _boxes_of(parameter, by_parameter[id(parameter)], own.start, own.end)


def _boxes_of(
    parameter: torch.nn.Parameter, entry: ShardedTensor | ShardedTensorFactory, start: int, end: int
) -> Iterator[_Box]:
    """Of the elements ``start:end`` of a weight, which may be stored in several parts, one after the other."""
    parts = list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
    begin = 0
    for part in parts:
        size = math.prod(part.local_shape)
        low, high = max(start, begin), min(end, begin + size)
        done = low - start
        for offset, shape in boxes_of_run(part.local_shape, low - begin, high - begin) if low < high else []:
            length = math.prod(shape)
            place = replace(
                part,
                data=None,
                dtype=torch.float32,
                local_shape=shape,
                global_offset=_moved(part, offset),
                axis_fragmentations=None,
            )
            yield _Box(parameter=parameter, run=slice(done, done + length), place=place)
            done += length
        begin += size


def _moved(part: ShardedTensor, offset: tuple[int, ...]) -> tuple[int, ...]:
    axes = part.prepend_axis_num
    moved = (a + b for a, b in zip(part.global_offset[axes:], offset, strict=True))
    return (*part.global_offset[:axes], *moved)


def boxes_of_run(shape: tuple[int, ...], start: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of boxes that, one after the other and each row by row, are the elements ``start:end``."""
    if len(shape) == 1:
        return [((start,), (end - start,))]
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), end // inner  # whole slices of the first axis

    def within(index: int, low: int, high: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        found = boxes_of_run(shape[1:], low - index * inner, high - index * inner)
        return [((index, *offset), (1, *size)) for offset, size in found]

    if first > last:
        return within(last, start, end)
    boxes = within(first - 1, start, first * inner) if start < first * inner else []
    if first < last:
        boxes.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return boxes + (within(last, last * inner, end) if last * inner < end else [])
