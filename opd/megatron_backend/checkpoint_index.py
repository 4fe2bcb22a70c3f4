"""Reading what comes with the tensors of a checkpoint, without running anything that a file may say.

torch unpickles the index (``.metadata``) freely, so that it is first read by an unpickler that knows its handful of
classes; ``common.pt`` is loaded with ``weights_only``.
"""

from __future__ import annotations

import enum
import pickle
from pathlib import Path
from typing import Any

import torch

from opd.megatron_backend.checkpoint_layout import CheckpointError


def check_index(path: Path) -> None:
    """Raises CheckpointError when the index is missing, broken, or would run code if torch unpickled it."""
    try:
        with (path / ".metadata").open("rb") as file:
            _MetadataUnpickler(file).load()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"`{path}` is no whole torch_dist checkpoint: it has no .metadata. Copy it again, or give another one."
        ) from error
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise CheckpointError(f"`{path}/.metadata` is damaged or not to be trusted: {error}") from error


def read_common(path: Path) -> dict[str, Any]:
    """What is equal on every rank: plain containers and small tensors. Empty when there is no such file.

    Raises:
        CheckpointError: a file that is damaged, or holds anything else.
    """
    file = path / "common.pt"
    if not file.is_file():
        return {}  # no checkpoint of ours: the load says what is missing
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"`{file}` is damaged or not to be trusted: {reason}") from error


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
