"""``--help``: the flags that most runs need; ``--help TOPIC``: one group, one flag, or ``all`` of them."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

# In the order in which a run is put together; every name is a flag of the schema or ``config``.
COMMON: dict[str, tuple[str, ...]] = {
    "every run needs": ("hf_checkpoint", "prompt_data", "num_rollout", "rollout_batch_size", "output_dir"),
    "the teacher": ("use_opd", "opd_type", "opd_teacher_load", "rm_url", "opd_kl_coef", "distillation_type"),
    "the task's reward": ("rm_type", "custom_rm_path", "label_key", "advantage_estimator"),
    "prompts and answers": (
        "input_key", "apply_chat_template", "n_samples_per_prompt", "rollout_max_response_len", "rollout_temperature",
        "rollout_engine",
    ),
    "learning": ("lr", "lr_warmup_iters", "bf16", "lora_rank", "max_tokens_per_gpu"),
    "evaluation": ("eval_prompt_data", "eval_interval"),
    "checkpoints": ("save", "save_interval", "load"),
    "several devices": ("actor_num_gpus_per_node", "actor_num_nodes", "tensor_model_parallel_size", "rollout_num_gpus"),
    "before a run": ("dry_run", "config"),
}  # fmt: skip
# What stands for a value of type text, by the flag's last words; numbers are N (whole) and X.
_VALUES = {
    "_url": "URL", "_address": "HOST:PORT", "_host": "HOST", "_path": "MODULE.FUNCTION", "_key": "FIELD",
    "_data": "FILE", "_file": "FILE", "_kwargs": "JSON", "_args": "'FLAGS'", "_template": "TEXT", "_prompt": "TEXT",
    "_env": "VARIABLE", "_name": "NAME", "_project": "NAME", "_group": "NAME", "_modules": "LAYER", "_freq": "TEXT",
    "_checkpoint": "FOLDER", "_load": "FOLDER", "_save": "FOLDER", "_dir": "FOLDER", "_hf": "FOLDER",
    "_serve": "FOLDER", "_cache": "FOLDER", "_tokenizer": "FOLDER", "_teachers": "NAME=WHERE",
    "_weights": "NAME=WEIGHT", "_coefs": "NAME=COEF", "_flags": "TEXT",
}  # fmt: skip
_HEAD = """\
usage: {program} [--config FILE] FLAGS

On-policy distillation: a student writes, a teacher scores every token, the student learns.
Below are the flags that most runs need; {count} more fit special cases.

"""
_MORE = """
more:
  --help GROUP  all flags of a group:
                {groups}
  --help FLAG   one flag, such as --help opd-kl-coef
  --help all    every flag; also in docs/flags.md

A first run, in a checkout: make demo, or
  python train.py --config examples/on_policy_distillation/configs/tiny_gkd.yaml --output-dir outputs/first
"""


class HelpFlag(argparse.Action):
    """Prints the page of its TOPIC and ends the process with status 0."""

    def __init__(self, option_strings: Sequence[str], dest: str = argparse.SUPPRESS, **kwargs: Any) -> None:
        super().__init__(option_strings, dest=dest, default=argparse.SUPPRESS, nargs="?", metavar="TOPIC", **kwargs)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        text = help_page(parser, str(values) if values is not None else None)
        sys.stdout.write(text)
        raise SystemExit(0)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """States a default where it says something: not for a switch, nor where the help says what happens without it."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((100, 24)).columns, 120) - 2
        # Most names and their values then stand on the line of their help.
        super().__init__(prog, max_help_position=33 if width > 90 else 24, width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # a flag's name stays whole

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool) or action.default == argparse.SUPPRESS:
            on = action.default is True and isinstance(action, argparse.BooleanOptionalAction)
            return f"{action.help} (on unless turned off)" if on else action.help
        return super()._get_help_string(action)


def value_name(name: str, kind: type) -> str:
    """What stands for a flag's value in its help: ``lr`` -> X, ``seed`` -> N, ``rm_url`` -> URL."""
    if kind in (int, float):
        return {int: "N", float: "X"}[kind]
    return next((shown for ending, shown in _VALUES.items() if f"_{name}".endswith(ending)), "TEXT")


def help_page(parser: argparse.ArgumentParser, topic: str | None) -> str:
    """The text of ``--help TOPIC``; None: that of ``--help``.

    Raises:
        SystemExit or ConfigError: what ``parser.error`` raises for a topic that is no group and no flag.
    """
    groups = {str(group.title): group for group in parser._action_groups if group.title and group._group_actions}
    groups.pop("options", None)
    if topic is None:
        return _common_page(parser, list(groups))
    if topic == "all":
        return parser.format_help()
    dashed = topic.lstrip("-").replace("_", "-")
    formatter = parser._get_formatter()
    if dashed in groups:  # before the flags: `optimizer` is a group and a flag of it
        _add_section(formatter, dashed, groups[dashed].description, groups[dashed]._group_actions)
        return formatter.format_help()
    action = _actions(parser).get(dashed)
    if action is None:
        parser.error(_unknown_topic(topic, [*groups, *_actions(parser)]))
    title = next((title for title, group in groups.items() if action in group._group_actions), None)
    _add_section(formatter, f"of the group {title}" if title else "options", None, [action])
    return formatter.format_help()


def program() -> str:
    """How this process was started, for the usage line."""
    name = os.path.basename(sys.argv[0])
    return {"opd-train": "opd-train", "__main__.py": "python -m opd"}.get(name, "python train.py")


def _common_page(parser: argparse.ArgumentParser, groups: list[str]) -> str:
    actions, formatter = _actions(parser), parser._get_formatter()
    for title, names in COMMON.items():
        _add_section(formatter, title, None, [actions[name.replace("_", "-")] for name in names])
    others = len({id(action) for action in actions.values()}) - sum(map(len, COMMON.values()))
    head = _HEAD.format(program=program(), count=others)
    return head + formatter.format_help() + _MORE.format(groups=_wrapped(groups, width=60))


def _wrapped(names: list[str], *, width: int) -> str:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] += f"{name} "
    return ("\n" + " " * 16).join(line.rstrip() for line in lines)


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Those that help shows, by the flag's name without dashes."""
    shown = (action for action in parser._actions if action.help != argparse.SUPPRESS)
    return {option[2:]: action for action in shown for option in action.option_strings if option.startswith("--")}


def _add_section(
    formatter: argparse.HelpFormatter, title: str, about: str | None, actions: Sequence[argparse.Action]
) -> None:
    formatter.start_section(title)
    formatter.add_text(about)
    formatter.add_arguments(actions)
    formatter.end_section()


def _unknown_topic(topic: str, known: list[str]) -> str:
    close = difflib.get_close_matches(topic.lstrip("-").replace("_", "-"), known, n=1)
    hint = f"Did you mean `--help {close[0]}`?" if close else "Plain `--help` lists the groups."
    return f"`--help {topic}`: there is no group and no flag of that name. {hint}"
