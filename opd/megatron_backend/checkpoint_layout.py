"""Megatron's checkpoint folder: what is there, what is the latest, and how a checkpoint appears whole or not at all.

    DIR/latest_checkpointed_iteration.txt    "10" or "release": written last, so it only ever names a whole checkpoint
    DIR/iter_0000010/                        .metadata and *.distcp (tensors), common.pt, metadata.json, extra.json, ...
    DIR/release/                             weights only, from a conversion
    DIR/hf/                                  config.json and tokenizer of the model, so that DIR describes itself

Imports neither torch nor megatron: command-line checks use it before anything heavy is loaded. ``DirectoryWriter`` is
for one process (rank 0); ``checkpoint`` keeps the others in step.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from opd.errors import UserError

Iteration = int | Literal["release"]

TRACKER = "latest_checkpointed_iteration.txt"
TEMPORARY = ".tmp_"  # being written
_REPLACED = ".previous_"  # moved aside while a checkpoint of the same iteration takes its place
_HF_FOLDER = "hf"
_HF_PATTERNS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "*.tiktoken",
)  # fmt: skip


class CheckpointError(UserError):
    """A checkpoint that cannot be found, read or written. The message names the folder and what to do."""


def folder_name(iteration: Iteration) -> str:
    return "release" if iteration == "release" else f"iter_{iteration:07d}"


def latest_iteration(directory: str | Path) -> Iteration | None:
    """What the tracker file names; ``None`` when there is no tracker, hence no checkpoint.

    Raises:
        CheckpointError: a tracker with other content.
    """
    tracker = Path(directory) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if text == "release":
        return "release"
    if not text.isdigit():
        raise CheckpointError(
            f"`{tracker}` holds `{text}`: expected an iteration number or `release`. Write the number of an "
            "iter_NNNNNNN folder beside it."
        )
    return int(text)


def iterations(directory: str | Path) -> list[Iteration]:
    """The whole checkpoints in the folder, ascending, ``release`` first."""
    names = [p.name.removeprefix(_REPLACED) for p in Path(directory).iterdir() if p.is_dir()]
    found: set[Iteration] = {int(n[5:]) for n in names if n.startswith("iter_") and n[5:].isdigit()}
    release: list[Iteration] = ["release"] if "release" in names else []
    return release + sorted(found)


def resolve(directory: str | Path, step: Iteration | None = None) -> Path:
    """The folder of one checkpoint: the given step, or the latest. ``directory`` may also be such a folder itself.

    Raises:
        CheckpointError: no such folder, no checkpoint in it, or not this step; lists the steps that are there.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint folder `{directory}` does not exist. Check the path.")
    if step is None and (directory / "metadata.json").is_file() and (directory / "common.pt").is_file():
        return directory
    iteration = latest_iteration(directory) if step is None else step
    if iteration is None:
        raise CheckpointError(
            f"`{directory}` holds no checkpoint: it has no {TRACKER}. A Hugging Face folder is converted with "
            "tools/convert_hf_to_torch_dist.py."
        )
    name = folder_name(iteration)
    for candidate in (directory / name, directory / (_REPLACED + name)):
        if candidate.is_dir():
            return candidate
    there = ", ".join(str(i) for i in iterations(directory)) or "none"
    raise CheckpointError(
        f"`{directory}` holds no checkpoint of step {iteration} (steps there: {there}). Choose one of these "
        f"({TRACKER} has the number of the latest), or give another folder."
    )


def write_hf_files(source: str | Path, directory: str | Path) -> Path:
    """Copies config, tokenizer and chat template, not weights, of a Hugging Face folder to ``directory/hf``."""
    source, target = Path(source), Path(directory) / _HF_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    if source.resolve() != target.resolve():
        copy_hf_files(source, target)
    return target


def copy_hf_files(source: Path, target: Path) -> None:
    for pattern in _HF_PATTERNS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    templates = source / "chat_templates"  # transformers' folder for a model with several templates
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name, dirs_exist_ok=True)


def hf_files(directory: str | Path) -> Path | None:
    """The Hugging Face files that a checkpoint carries; ``directory`` is its root or one of its iteration folders."""
    directory = Path(directory)
    for root in (directory, directory.parent):
        if (root / _HF_FOLDER / "config.json").is_file():
            return root / _HF_FOLDER
    return None


class DirectoryWriter:
    """Puts one checkpoint in place: ``begin``, write into the folder it returns, then ``commit`` or ``abort``."""

    def __init__(self, directory: str | Path, iteration: Iteration) -> None:
        self.directory = Path(directory)
        self.iteration = iteration
        self.temporary = self.directory / (TEMPORARY + folder_name(iteration))

    def begin(self) -> Path:
        """Removes what interrupted saves left and makes an empty temporary folder."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("iter_*", "release", TRACKER):  # and not all: an export may be under way beside it
            for leftover in self.directory.glob(TEMPORARY + name):
                _remove(leftover)
        for replaced in self.directory.glob(_REPLACED + "*"):
            final = self.directory / replaced.name.removeprefix(_REPLACED)
            if final.exists():
                shutil.rmtree(replaced)
            else:  # killed between the two renames of ``commit``
                replaced.rename(final)
        self.temporary.mkdir()
        return self.temporary

    def commit(self) -> Path:
        """Makes the folder's content durable, gives it its name, then points the tracker at it."""
        for file in self.temporary.rglob("*"):
            _sync(file)
        _sync(self.temporary)
        final = self.directory / folder_name(self.iteration)
        replaced = self.directory / (_REPLACED + final.name)
        if final.exists():
            final.rename(replaced)
        self.temporary.rename(final)
        _sync(self.directory)
        write_durably(self.directory / TRACKER, str(self.iteration))
        if replaced.exists():
            shutil.rmtree(replaced)
        return final

    def abort(self) -> None:
        _remove(self.temporary)


def write_durably(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader, or a crash, sees the old text or the new."""
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
