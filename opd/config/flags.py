"""Command line -> Config: argparse made from the schema's dataclasses, over the defaults of a ``--config`` file."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
import types
import typing
from dataclasses import fields
from typing import Any, NoReturn

from opd.config.help import HelpFlag, HelpFormatter, program, value_name
from opd.config.schema import Config
from opd.config.slime_flags import DEFAULTS as SLIME_DEFAULTS
from opd.config.slime_flags import dependent_defaults, translate
from opd.config.slime_table import FLAGS as SLIME_FLAGS
from opd.errors import UserError


class ConfigError(UserError):
    """A flag that breaks a rule. The message names the flag, its value, the rule and the remedy."""


class _Parser(argparse.ArgumentParser):
    """argparse with our wording: flag, value, rule, remedy."""

    def error(self, message: str) -> NoReturn:
        given = re.fullmatch(r"argument (?:-\w/)?(--\S+): ignored explicit argument '(.*)'", message)
        if given:
            message = f"`{given[1]}={given[2]}`: a switch takes no value. Write `{given[1]}`, or leave it out."
        raise ConfigError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            close = difflib.get_close_matches(str(value), action.choices, n=1)
            remedy = f"Did you mean `{close[0]}`?" if close else "Choose one of these."
            allowed = ", ".join(map(str, action.choices))
            raise ConfigError(f"`{action.option_strings[-1]}={value}` must be one of {allowed}. {remedy}")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError as error:
            rule, example = _NUMBERS[action.type is int]
            flag = action.option_strings[-1]
            raise ConfigError(f"`{flag}={text}` must be {rule}. Write it in digits, such as {example}.") from error

    def _match_argument(self, action: argparse.Action, pattern: str) -> int:
        try:
            return super()._match_argument(action, pattern)
        except argparse.ArgumentError as error:
            flag = action.option_strings[-1]
            value = "|".join(action.choices) if action.choices else action.metavar
            raise ConfigError(f"`{flag}` needs a value, and none follows it. Write `{flag} {value}`.") from error


_NUMBERS = {True: ("a whole number", "8"), False: ("a number", "0.5 or 1e-6")}


def parse_flags(argv: list[str]) -> Config:
    """Parses without checking rules between flags (see ``validate.check``).

    With ``--config FILE`` the file's values take the place of the defaults, so a flag overrides them. Flags of slime's
    that the schema does not have are read by ``slime_flags``.

    Raises:
        ConfigError: unknown flag, wrong type or choice, a file with one of these, or a flag of slime's that is refused.
    """
    parser = build_parser()
    argv = _from_slime(parser, argv)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ConfigError(_unknown_flag_message(parser, unknown[0]))
    from_file = {} if namespace.config is None else _config_file_values(namespace.config)
    if from_file:
        parser.set_defaults(**from_file)
        namespace = parser.parse_args(argv)
    if namespace.slime_defaults:
        parser.set_defaults(**SLIME_DEFAULTS | from_file)
        parser.set_defaults(**dependent_defaults(parser.parse_args(argv)) | from_file)
        namespace = parser.parse_args(argv)
    sections = {}
    for section in fields(Config):
        section_type = type(getattr(Config(), section.name))
        sections[section.name] = section_type(**{f.name: getattr(namespace, f.name) for f in fields(section_type)})
    return Config(**sections)


def _from_slime(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    known = {option for action in parser._actions for option in action.option_strings}
    return translate(argv, known, refuse=ConfigError)


def _config_file_values(paths: list[str]) -> dict[str, Any]:
    if len(paths) > 1:
        raise ConfigError(
            f"{' '.join(f'`--config={path}`' for path in paths)}: a run has one file. Join them, or give the rest as "
            "flags."
        )
    from opd.config.config_file import read_config_file  # here: it needs ConfigError, and a run without a file no YAML

    return read_config_file(paths[0])


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        usage=f"{program()} [--config FILE] FLAGS",
        description="On-policy distillation: a student writes, a teacher scores every token, the student learns.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        add_help=False,
    )
    parser.add_argument(
        "-h",
        "--help",
        action=HelpFlag,
        help="the flags that most runs need; TOPIC: a group of flags, one flag, or all",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML file of flags, named without their dashes; flags on the command line override it, --no-NAME turns "
        "off a switch that it turns on",
    )
    for section_field in fields(Config):
        section_type = type(getattr(Config(), section_field.name))
        about = inspect.getdoc(section_type) or ""
        if about.startswith(f"{section_type.__name__}("):  # a dataclass without a docstring gets its signature as one
            about = ""
        group = parser.add_argument_group(section_field.name.replace("_", "-"), about or None)
        hints = typing.get_type_hints(section_type)
        for f in fields(section_type):
            name = "--" + f.name.replace("_", "-")
            group.add_argument(name, **_argparse_kwargs(f.name, hints[f.name], f.default, f.metadata))
            if hints[f.name] is bool and not f.default:  # out of --help: only a file or an earlier flag gives it a use
                group.add_argument(
                    "--no-" + name[2:], dest=f.name, action="store_false", default=f.default, help=argparse.SUPPRESS
                )
    return parser


def _argparse_kwargs(name: str, annotation: Any, default: Any, metadata: Any) -> dict[str, Any]:
    common = {"help": metadata["help"], "default": default}
    if annotation is bool:
        action = argparse.BooleanOptionalAction if default else "store_true"
        return {"action": action, **common}
    if isinstance(annotation, types.UnionType):  # X | None
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is list:
        (annotation,) = typing.get_args(annotation)
    kwargs = {"type": annotation, **common}
    if metadata["choices"]:
        kwargs["choices"] = metadata["choices"]
    else:
        kwargs["metavar"] = value_name(name, annotation)
    if metadata["nargs"]:
        kwargs["nargs"] = metadata["nargs"]
    return kwargs


def _unknown_flag_message(parser: argparse.ArgumentParser, token: str) -> str:
    name = token.split("=", 1)[0]
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    known = [option for action in shown for option in action.option_strings]
    known += [f"--{option}" for option, treatment in SLIME_FLAGS.items() if treatment.kind != "refused"]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else " `train.py --help all` lists every flag."
    kind = "flag" if name.startswith("-") else "argument"
    return f"unknown {kind} `{name}`.{hint}"


def flag_text(name: str, value: Any = None) -> str:
    """How messages write a flag of the schema: ``rollout_top_p`` and 2.0 -> `--rollout-top-p=2.0`, in backquotes."""
    dashed = "--" + name.replace("_", "-")
    if value is None or value is True:
        return f"`{dashed}`"
    if value is False:
        return f"`--no-{dashed[2:]}`"
    if isinstance(value, (list, tuple)):
        return f"`{dashed} {' '.join(map(str, value))}`"
    return f"`{dashed}={value}`"


def exit_with_error(error: Exception, status: int = 2) -> NoReturn:
    """One ``error:`` line on stderr; 2 is for flags that break a rule, 1 for what goes wrong later."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(status)
