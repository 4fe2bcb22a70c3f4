"""Hugging Face folders that are not there, or not whole: a download that broke off is found before a model is built.

Only headers are read: 8 bytes with the length of a JSON object, which names each tensor's place in the rest of the file
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from opd.config.flags import flag_text
from opd.config.schema import Config
from opd.config.teachers import teachers

INDEX = "model.safetensors.index.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def no_such_folder(shown: str, folder: str) -> str:
    """``shown``: flag and value as messages write them."""
    if _HUB_NAME.fullmatch(folder):
        return (
            f"{shown}: no such folder. Check the path; a model of the Hugging Face hub is fetched first: `hf download "
            f"{folder} --local-dir FOLDER`, and that folder given."
        )
    return f"{shown}: no such folder. Check the path."


def weight_file_rules(config: Config) -> Iterator[str]:
    """Each folder that a run may load weights from."""
    folders = {
        flag_text(name, folder): folder
        for name, folder in {
            "hf_checkpoint": config.checkpoint.hf_checkpoint,
            "critic_load": config.critic.critic_load,
            "mixture_teacher_load": config.mixture.mixture_teacher_load,
            "opd_teacher_serve": config.opd.opd_teacher_serve,
        }.items()
        if folder is not None
    }
    if config.opd.opd_type == "megatron":
        folders |= {teacher.shown: teacher.location for teacher in teachers(config) if teacher.location is not None}
    for shown, folder in folders.items():
        reason = damage(Path(folder), whole=not config.output.dry_run)
        if reason is not None:
            yield f"{shown}: {reason}. Download or copy the folder again."


def damage(folder: Path, *, whole: bool) -> str | None:
    """What is wrong with the folder's ``*.safetensors`` files, as far as their headers and the index of them show.

    ``whole``: whether a file that the index names and that is not there is a fault.
    """
    files = sorted(folder.glob("*.safetensors"))
    if whole and files and (folder / INDEX).is_file():
        named = _named(folder / INDEX)
        if named is None:
            return f"{INDEX} cannot be read as an index of weights"
        missing = sorted(named - {file.name for file in files})
        if missing:
            return f"{missing[0]}, which {INDEX} names, is not there ({len(missing)} of {len(named)} files are missing)"
    found = ((file.name, _file_damage(file)) for file in files)
    return next((f"{name} {reason}" for name, reason in found if reason is not None), None)


def _named(index: Path) -> set[str] | None:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _file_damage(file: Path) -> str | None:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                return f"is no safetensors file, or cut short after {size:,} bytes"
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "is no safetensors file: its header cannot be read"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"has {size:,} bytes, and its header announces {expected:,}"
