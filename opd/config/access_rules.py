"""Rules about what this user may read and write: a permission that is missing stops a run before it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from opd.config.flags import flag_text
from opd.config.schema import Config


def access_rules(config: Config) -> Iterator[str]:
    """Of paths that exist; what must exist is another rule's matter."""
    for name, path in _read(config):
        if path.exists() and not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            yield (
                f"{flag_text(name, path)} may not be read by this user (permission denied). Change its permissions, or "
                "give another path."
            )
    if config.output.dry_run:
        return  # a plan writes nothing
    for name, path in _written(config):
        there = _nearest(path)
        if not there.is_dir():
            yield f"{flag_text(name, path)} lies below {there}, which is a file. Give another path."
        elif not os.access(there, os.W_OK | os.X_OK):
            yield (
                f"{flag_text(name, path)} cannot be written: in {there} this user may not write (permission denied, or "
                "a read-only file system). Change its permissions, or give another path."
            )


def _read(config: Config) -> Iterator[tuple[str, Path]]:
    checkpoint, opd = config.checkpoint, config.opd
    single = {
        "prompt_data": config.data.prompt_data,
        "sft_data": config.off_policy.sft_data,
        "hf_checkpoint": checkpoint.hf_checkpoint,
        "ref_load": checkpoint.ref_load,
        "load": checkpoint.load,
        "critic_load": config.critic.critic_load,
        "opd_teacher_load": opd.opd_teacher_load,
        "opd_teacher_hf_checkpoint": opd.opd_teacher_hf_checkpoint,
        "opd_teacher_tokenizer": opd.opd_teacher_tokenizer,
    }
    yield from ((name, Path(path)) for name, path in single.items() if path is not None)
    yield from (("eval_prompt_data", Path(path)) for _, path in config.eval_sets)


def _written(config: Config) -> Iterator[tuple[str, Path]]:
    folders = {
        "output_dir": config.output.output_dir,
        "save": config.checkpoint.save,
        "save_hf": config.checkpoint.save_hf,
        "critic_save": config.critic.critic_save,
        "opd_teacher_cache": config.opd.opd_teacher_cache,
    }
    yield from ((name, Path(folder)) for name, folder in folders.items() if folder is not None)


def _nearest(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
