"""Weights -> ``model*.safetensors`` and their index, tensor by tensor: no more than one of them is held in memory.

A safetensors file begins with a header that names every tensor in it, which is known only at the end. Room for it is
left at the start of each file, and the header is padded with spaces, as the format allows. A file ends when its limit
of bytes is reached, or the room in its header.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8  # the header's length, little-endian, before the header


@dataclass
class _Header:
    """``data_offsets`` count from the end of the header."""

    room: int
    entries: dict[str, dict[str, object]] = field(default_factory=lambda: {"__metadata__": {"format": "pt"}})
    used: int = 32
    data: int = 0

    def add(self, name: str, tensor: torch.Tensor) -> bool:
        """False: there is no room for it."""
        entry = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.data, self.data + tensor.nbytes],
        }
        length = len(json.dumps({name: entry}))
        if self.used + length > self.room:
            return False
        self.entries[name] = entry
        self.used += length
        self.data += tensor.nbytes
        return True

    def text(self) -> bytes:
        return json.dumps(self.entries, separators=(",", ":")).encode().ljust(self.room)


class SafetensorsStream:
    """One process writes with it. The files have no names of their own until ``finish``.

    Args:
        shard: distinguishes this writer's files from those of other processes in the same folder.
        max_file_bytes: of tensors in one file; a larger tensor has a file of its own.
        header_bytes: room for names and shapes in each file, about 130 bytes a tensor.
    """

    def __init__(self, folder: Path, *, max_file_bytes: int, header_bytes: int = 1 << 17, shard: int = 0) -> None:
        self._folder = folder
        self._limit = max_file_bytes
        self._room = header_bytes // 8 * 8
        self._shard = shard
        self._file: io.BufferedWriter | None = None
        self._header = _Header(self._room)
        self.files: list[tuple[Path, list[str], int]] = []  # path, names, bytes of tensors

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Appends a tensor.

        Raises:
            OSError: the disk is full, or the like.
        """
        tensor = tensor.detach().cpu().contiguous()
        if self._file is not None and self._header.data + tensor.nbytes > self._limit:
            self._end_file()
        if self._file is None:
            self._begin_file()
        if not self._header.add(name, tensor):
            self._end_file()
            self._begin_file()
            if not self._header.add(name, tensor):
                raise ValueError(f"the header has no room for `{name}`: {self._room} bytes")
        self._file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))

    def close(self) -> None:
        """Ends the last file."""
        if self._file is not None:
            self._end_file()

    def _begin_file(self) -> None:
        path = self._folder / f".part_{self._shard:05d}_{len(self.files):05d}.safetensors"
        self._file = path.open("wb")
        self._file.seek(_LENGTH_BYTES + self._room)
        self._header = _Header(self._room)

    def _end_file(self) -> None:
        file, header = self._file, self._header
        file.seek(0)
        file.write(self._room.to_bytes(_LENGTH_BYTES, "little"))
        file.write(header.text())
        file.flush()
        os.fsync(file.fileno())
        file.close()
        names = [name for name in header.entries if name != "__metadata__"]
        self.files.append((Path(file.name), names, header.data))
        self._file = None


def name_files(folder: Path, files: list[tuple[Path, list[str], int]]) -> None:
    """Gives the files of all writers their names, ``model-00001-of-00004.safetensors`` and so on, and writes the index;
    a single one is ``model.safetensors`` and needs none. In the order given."""
    weight_map: dict[str, str] = {}
    for number, (path, names, _) in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    if len(files) > 1:
        total = sum(size for _, _, size in files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
