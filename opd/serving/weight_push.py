"""Gives new weights to a running SGLang server: through shared memory on one machine, or through a folder.

Through shared memory, tensors are packed into buckets, each one shared block; SGLang's own workers map the block and
read the tensors in place. The pickled form needs torch only, so the trainer does not import sglang.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch

from opd.errors import WeightSyncError
from opd.serving.http import HttpError, JsonClient

BUCKET_BYTES = 1 << 30
SHARED_MEMORY = "/dev/shm"
_INDEX = "model.safetensors.index.json"
_ALIGNMENT = 64  # bytes; every dtype may start at a multiple of it

NamedTensors = list[tuple[str, torch.Tensor]]


def never() -> bool:
    return False


async def push_bucket(
    client: JsonClient, payload: str, *, tp_size: int, version: int | None, give_up: Callable[[], bool] = never
) -> None:
    """One bucket; the last one carries ``version`` and flushes the prefix cache, which holds the old weights' states.

    Raises:
        WeightSyncError: the server refused it.
    """
    body: dict[str, Any] = {"serialized_named_tensors": [payload] * tp_size, "flush_cache": version is not None}
    if version is not None:
        body["weight_version"] = str(version)
    await command(client, "/update_weights_from_tensor", body, give_up=give_up)


async def push_folder(
    client: JsonClient, folder: str | Path, *, version: int, give_up: Callable[[], bool] = never
) -> None:
    """Raises:
    WeightSyncError: the server refused the folder and keeps its old weights.
    """
    body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": True}
    await command(client, "/update_weights_from_disk", body, give_up=give_up)


async def pause(client: JsonClient, *, give_up: Callable[[], bool] = never) -> None:
    """No token is written until ``resume``; requests stay with the server.

    "retract" puts running requests back into the server's queue, and their prefixes are computed anew afterwards: with
    "in_place" the tokens after an update would be drawn by the new weights over the old weights' keys and values.

    Raises:
        WeightSyncError: the server refused it.
    """
    await command(client, "/pause_generation", {"mode": "retract"}, give_up=give_up)


async def resume(client: JsonClient, *, give_up: Callable[[], bool] = never) -> None:
    """Raises:
    WeightSyncError: the server refused it.
    """
    await command(client, "/continue_generation", {"torch_empty_cache": False}, give_up=give_up)


async def command(client: JsonClient, path: str, body: dict[str, Any], *, give_up: Callable[[], bool] = never) -> None:
    """
    Args:
        give_up: see ``JsonClient.post``.

    Raises:
        WeightSyncError: the server refused it, or cannot be reached.
    """
    try:
        answer = await client.post(path, body, give_up=give_up)
    except HttpError as error:
        raise WeightSyncError(f"the SGLang server refused the new weights: {error}") from error
    if not answer.get("success", answer.get("status") == "ok"):
        raise WeightSyncError(f"the SGLang server refused the new weights at {path}: {answer.get('message')}")


def buckets(named_tensors: Iterable[tuple[str, torch.Tensor]], limit_bytes: int) -> Iterator[NamedTensors]:
    """Consecutive tensors of at most ``limit_bytes`` together, or a single larger one."""
    bucket: NamedTensors = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and size + _padded(tensor) > limit_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += _padded(tensor)
    if bucket:
        yield bucket


def share_bucket(bucket: NamedTensors) -> tuple[str, torch.Tensor]:
    """(payload for ``push_bucket``, the shared block, which must live until the server has answered).

    Raises:
        WeightSyncError: the machine's shared memory cannot hold it.
    """
    needed = sum(_padded(tensor) for _, tensor in bucket)
    if needed > free_shared_memory():
        raise WeightSyncError(
            f"{needed / 2**20:.0f} MiB of weights (up to `{bucket[-1][0]}`) do not fit into the free part of "
            f"{SHARED_MEMORY}, {free_shared_memory() / 2**20:.0f} MiB. Enlarge it (docker run --shm-size=8g)."
        )
    with _shared_by_name():
        block = torch.empty(needed, dtype=torch.uint8).share_memory_()
        views: NamedTensors = []
        offset = 0
        for name, tensor in bucket:
            size = tensor.numel() * tensor.element_size()
            view = block[offset : offset + size].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor.detach())
            views.append((name, view))
            offset += _padded(tensor)
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(views)
    return base64.b64encode(buffer.getvalue()).decode("ascii"), block


def write_folder(named_tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *, model_folder: str | Path) -> None:
    """Writes the weights beside copies of ``model_folder``'s config and tokenizer files."""
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for source in Path(model_folder).iterdir():
        if source.suffix in (".json", ".jinja", ".txt", ".model", ".py") and source.name != _INDEX:
            shutil.copyfile(source, folder / source.name)
    index: dict[str, str] = {}
    for number, bucket in enumerate(buckets(named_tensors, BUCKET_BYTES)):
        name = f"model-{number:05d}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in bucket}, folder / name)
        index.update({key: name for key, _ in bucket})
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def free_shared_memory() -> int:
    """Bytes."""
    stat = os.statvfs(SHARED_MEMORY)
    return stat.f_bavail * stat.f_frsize


def _padded(tensor: torch.Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@contextmanager
def _shared_by_name() -> Iterator[None]:
    """torch's default hands file descriptors over a socket to a process it forked itself; a server that is given such
    a handle over HTTP dies. Shared by name, any process of this user can open the block."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
