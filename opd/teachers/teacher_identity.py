"""Which teacher a stored score comes from: a text that differs when anything that can be known of the weights does.

What cannot be known from here (other weights under the same name on another machine) shows in the scores: see
``opd.teachers.score_cache``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from opd.sampling.model_identity import WEIGHTS, model_identity

# Of SGLang's /server_info, what changes the log-probs beyond rounding; absent in a version that has no such option.
SERVING = ("dtype", "quantization", "kv_cache_dtype", "json_model_override_args")
SERVING_DEFAULTS = {"kv_cache_dtype": "auto", "json_model_override_args": "{}"}
FIRST_VERSION = "default"  # SGLang's weight_version until an update names another


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """
    Args:
        text: what is known of the weights, canonical.
        started: another one after each start of the server: then its weights must be looked at again.
    """

    text: str
    started: str


async def served_identity(get: Callable[[str], Awaitable[Any]], name: str | None = None) -> TeacherIdentity:
    """Of an SGLang server.

    Args:
        get: path -> decoded JSON answer.
        name: the user's own name for these weights.

    Raises:
        HttpError: of ``get``.
    """
    model, server = await get("/model_info"), await get("/server_info")
    text = await asyncio.to_thread(served_text, model, server, name)  # reads files
    # SGLang tells no time of day but how long the parts of its start took, to the nanosecond: no two are the same.
    return TeacherIdentity(text=text, started=str(server.get("startup_time")))


def served_text(model: dict[str, Any], server: dict[str, Any], name: str | None) -> str:
    """``model``, ``server``: the answers of /model_info and /server_info."""
    path = str(model.get("model_path"))
    serving = {field: server.get(field) or SERVING_DEFAULTS.get(field) for field in SERVING}
    if serving["dtype"] == "auto":
        serving["dtype"] = _own_dtype(Path(path))
    return _text(path, str(model.get("weight_version")), str(model.get("load_format")), serving, name)


def local_text(folder: str | Path, dtype: str, name: str | None = None) -> str:
    """Of a Hugging Face folder that is run in this process: that of a server with the same folder and dtype, so that
    either one's scores serve the other."""
    serving: dict[str, Any] = {"dtype": dtype, "quantization": None, **SERVING_DEFAULTS}
    return _text(str(folder), FIRST_VERSION, "auto", serving, name)


def _text(path: str, version: str, load_format: str, serving: dict[str, Any], name: str | None) -> str:
    parts = {"model": path, "weight_version": version, "load_format": load_format, **serving, "name": name}
    if Path(path).is_dir():
        folder = Path(path).resolve()
        files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
        # A fine-tuned folder may differ in places that model_identity does not sample: hence the times.
        parts["written"] = [file.stat().st_mtime_ns for file in files]
        parts["model"] = _folder_identity(str(folder), tuple(parts["written"]))
    return json.dumps(parts, sort_keys=True)


@lru_cache(maxsize=16)
def _folder_identity(folder: str, written: tuple[int, ...]) -> str:
    """``written`` is there for the cache: other times mean that the files are read again."""
    return model_identity(folder)


def _own_dtype(folder: Path) -> str:
    """What "auto" means for a folder on this machine."""
    config = folder / "config.json"
    if not config.is_file():
        return "auto"
    values = json.loads(config.read_text(encoding="utf-8"))
    return str(values.get("dtype") or values.get("torch_dtype") or "auto")
