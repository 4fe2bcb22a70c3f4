"""Rules for what is saved, how, and how much of it is kept."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path

from opd.config.flags import flag_text
from opd.config.schema import Config
from opd.config.teachers import teachers

ROLLOUT_ID = "rollout_id"  # the field of --save-hf, slime's name
_OWN = ("release", "hf", "critic", "moving_average_teacher", "peft", "rollout_journal")  # what lies in --save
_READ = ("hf_checkpoint", "ref_load", "load", "save")


def checkpoint_rules(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.save is None:
        for name in ("save_interval", "save_retain", "save_retain_interval", "async_save", "save_hf"):
            value = getattr(checkpoint, name)
            if value is not None and value is not False:
                yield f"{flag_text(name, value)} needs `--save`. Give the folder for checkpoints."
    if checkpoint.load is None:
        for name in ("finetune", "no_load_optim", "no_load_rng"):
            if getattr(checkpoint, name):
                yield f"{flag_text(name)} needs `--load`. Give the checkpoint folder, or drop it."
    kept, saved = checkpoint.save_retain_interval, checkpoint.save_interval
    if kept is not None and saved is not None and kept % saved:
        yield (
            f"{flag_text('save_retain_interval', kept)} must be a multiple of {flag_text('save_interval', saved)}: only"
            " what is saved can be kept. Change one of them."
        )
    if checkpoint.save_hf is not None:
        yield from _export_rules(config, checkpoint.save_hf)


def _export_rules(config: Config, template: str) -> Iterator[str]:
    shown = flag_text("save_hf", template)
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        first = Path(template.format(**{name: 1 for name in fields if name == ROLLOUT_ID}))
    except (ValueError, KeyError, IndexError):
        yield f"{shown} may have one field, {{{ROLLOUT_ID}}}. Give a folder such as exports/step_{{{ROLLOUT_ID}}}."
        return
    save = config.checkpoint.save
    among = save is not None and first.parent.resolve() == Path(save).resolve()
    if among and (first.match("iter_*") or first.name in _OWN):
        yield f"{shown} is where {flag_text('save', save)} has files of its own. Give another folder."
    if fields:
        return
    # The same folder for every export: it is written over, so it must not be one that something is read from.
    read = {flag_text(name, getattr(config.checkpoint, name)): getattr(config.checkpoint, name) for name in _READ}
    read |= {teacher.shown: teacher.location for teacher in teachers(config) if config.opd.opd_type == "megatron"}
    for name, folder in read.items():
        if folder is not None and Path(folder).resolve() == first.resolve():
            yield f"{shown} is also {name}, and would be written over. Give a folder of its own."
    if first.is_file() or (first.is_dir() and any(first.iterdir()) and not (first / "config.json").is_file()):
        yield f"{shown} holds something else than a model. Give a new folder, or an earlier export."
