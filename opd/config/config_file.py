"""``--config FILE``: flags from a YAML file, each checked against the schema, each error with its line.

Keys are flag names without the leading dashes, at the top level or under the name of their section in the schema
(``optimizer:``, ``opd:``, ...). Only the shape of the text is read and no object is constructed, so a key that stands
twice is seen and no tag can run code. Scalars follow YAML 1.2's core schema: PyYAML's own YAML 1.1 reads ``1e-6`` as
text, ``010`` as 8, ``yes`` as true and ``2026-01-01`` as a date.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from opd.config.flags import ConfigError
from opd.config.schema import Config

_HEADINGS = tuple(section.name for section in fields(Config))
_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_SHELL = re.compile(r"~(/|$)|\$\{?[A-Za-z_]")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}


_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"(~|null|Null|NULL)?$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


_SHAPES = {  # is it a list?
    True: "a list with at least one value. Write `[A, B]`, or a line `- A` for each.",
    False: "one value. Give only one, without brackets or braces.",
}
_RULES: dict[type, tuple[str, str]] = {
    bool: ("true or false", "Write one of these two words, without quotes."),
    int: ("a whole number", "Write it in digits, without quotes or a decimal point."),
    float: ("a number", "Write it without quotes, such as 0.5 or 1e-6."),
    str: ("text", "Put it in quotes."),
}


@dataclass(frozen=True, kw_only=True)
class _Flag:
    section: str
    annotation: Any  # bool, int, float, str, or list[...] of these
    optional: bool
    choices: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One ``key: value`` of the file. ``section`` is the heading it stands under, None at the top level."""

    key: str
    node: yaml.Node
    line: int
    section: str | None


def read_config_file(path: str) -> dict[str, Any]:
    """The file's flags by the schema's names, typed like parsed ones. A null is a flag that is not given.

    Paths are returned as written: they are relative to the working directory, as on the command line.

    Raises:
        ConfigError: file missing or no YAML mapping; unknown or repeated key, key under another section's heading,
            value of the wrong type. The message names file, line, key, value, rule and remedy.
    """
    flags = _schema_flags()
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for entry in _entries(path, _read_text(path)):
        name = entry.key.replace("-", "_")
        if name not in flags:
            is_group = entry.section is None and isinstance(entry.node, yaml.MappingNode)
            _refuse(path, entry.line, _unknown_heading(entry.key) if is_group else _unknown_key(entry.key, list(flags)))
        if name in lines:
            _refuse(
                path,
                entry.line,
                f"`{entry.key}` stands in line {lines[name]} already, and a flag has one value. Delete one of the two.",
            )
        lines[name] = entry.line
        home = flags[name].section
        if entry.section not in (None, home):
            _refuse(
                path,
                entry.line,
                f"`{entry.key}` stands under `{entry.section}:` and belongs to `{home}:`. Move it there, or to the "
                "top level.",
            )
        value = _checked_value(path, entry, flags[name])
        if value is not None:
            values[name] = value
    if not lines:
        raise ConfigError(f"`--config={path}` gives no flag. Write at least one `name: value`, or drop `--config`.")
    return values


def _schema_flags() -> dict[str, _Flag]:
    result = {}
    for section in fields(Config):
        section_type = type(getattr(Config(), section.name))
        hints = typing.get_type_hints(section_type)
        for f in fields(section_type):
            annotation, optional = hints[f.name], isinstance(hints[f.name], types.UnionType)
            if optional:
                annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
            result[f.name] = _Flag(
                section=section.name, annotation=annotation, optional=optional, choices=f.metadata["choices"]
            )
    return result


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"`--config={path}`: there is no such file. Give the path of a YAML file.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"`--config={path}` cannot be read: {reason}. Give the path of a YAML file.") from error


def _entries(path: str, text: str) -> Iterator[_Entry]:
    """Every flag's key in the order of the file, headings resolved."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        _refuse(path, mark.line + 1 if mark else 1, f"this is not YAML: {error.problem}. Mend the file.")
    except yaml.YAMLError as error:
        raise ConfigError(f"`--config={path}` is not YAML: {error}. Mend the file.") from error
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        _refuse(path, root.start_mark.line + 1, "the file must be a mapping of flags to values. Write `name: value`.")
    seen: dict[str, int] = {}
    for key, node in root.value:
        name, line = _key_text(path, key), key.start_mark.line + 1
        heading = name.replace("-", "_")
        # `optimizer` is a heading and a flag: what stands below it tells which.
        if heading not in _HEADINGS or not (isinstance(node, yaml.MappingNode) or _is_null(node)):
            yield _Entry(key=name, node=node, line=line, section=None)
            continue
        if heading in seen:
            _refuse(path, line, f"`{name}:` stands in line {seen[heading]} already. Join the two.")
        seen[heading] = line
        for inner, value in node.value if isinstance(node, yaml.MappingNode) else []:
            inner_line = inner.start_mark.line + 1
            yield _Entry(key=_key_text(path, inner), node=value, line=inner_line, section=heading)


def _key_text(path: str, key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        _refuse(path, key.start_mark.line + 1, "a key must be the name of a flag. Write `name: value`.")
    return key.value


def _is_null(node: yaml.Node) -> bool:
    return node.tag == _TAG + "null"


def _checked_value(path: str, entry: _Entry, flag: _Flag) -> Any:
    value = _plain_value(path, entry, entry.node)
    shown = f"`{entry.key}: {_as_yaml(value)}`"
    if value is None:
        if flag.optional:
            return None
        _refuse(path, entry.line, f"`{entry.key}:` has no value. Give one, or delete the line for the default.")
    is_list = typing.get_origin(flag.annotation) is list
    kind = typing.get_args(flag.annotation)[0] if is_list else flag.annotation
    if value == [] or is_list != isinstance(value, list) or (isinstance(value, yaml.Node) and not is_list):
        _refuse(path, entry.line, f"{shown} must be {_SHAPES[is_list]}")
    for item in value if is_list else [value]:
        if not _fits(item, kind):
            which = f"`{_as_yaml(item)}` in {shown}" if is_list else shown
            rule, remedy = _RULES[kind]
            _refuse(path, entry.line, f"{which} must be {rule}. {remedy}")
        if flag.choices and item not in flag.choices:
            _refuse(path, entry.line, f"{shown} must be one of {', '.join(flag.choices)}. Choose one of these.")
        if isinstance(item, str) and _SHELL.match(item.rpartition("=")[2] if is_list else item):  # NAME=PATH in lists
            _refuse(
                path,
                entry.line,
                f"{shown}: `~` and environment variables are not expanded in a file. Write the path itself, or give "
                f"`--{entry.key.replace('_', '-')}` on the command line, where the shell expands it.",
            )
    return [kind(item) for item in value] if is_list else kind(value)


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _plain_value(path: str, entry: _Entry, node: yaml.Node) -> Any:
    """bool, int, float, str, None, or a list of these; a mapping stays a node, which fits no flag."""
    if isinstance(node, yaml.SequenceNode):
        return [
            item if isinstance(item, yaml.CollectionNode) else _plain_value(path, entry, item) for item in node.value
        ]
    if not isinstance(node, yaml.ScalarNode):
        return node
    text, tag = node.value, node.tag.removeprefix(_TAG)
    try:
        if tag == "null":
            return None
        if tag == "bool":
            return {"true": True, "false": False}[text.lower()]
        if tag in ("int", "float"):
            return int(text) if tag == "int" else float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (KeyError, ValueError):
        _refuse(path, entry.line, f"`{entry.key}: {text}` is no {tag}, which its tag says it is. Drop the tag.")
    if tag != "str":
        _refuse(path, entry.line, f"`{entry.key}`: the tag `{node.tag}` is not read. Write the value without a tag.")
    return text


def _as_yaml(value: Any) -> str:
    if isinstance(value, yaml.Node):
        return "{...}" if isinstance(value, yaml.MappingNode) else "[...]"
    if isinstance(value, list):
        return f"[{', '.join(_as_yaml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)


def _unknown_key(key: str, known: list[str]) -> str:
    dashed = key.replace("_", "-")
    if dashed.startswith("--"):
        return f"`{key}`: keys have no leading dashes. Write `{dashed.lstrip('-')}`."
    if dashed.removeprefix("no-").replace("-", "_") in known:
        return f"`{key}` turns a flag off on the command line. In a file write `{dashed.removeprefix('no-')}: false`."
    if dashed == "config":
        return f"`{key}`: a file cannot name another one. Put all flags in one file, or give the rest as flags."
    close = difflib.get_close_matches(dashed, [name.replace("_", "-") for name in known], n=1)
    listed = "Keys are the flags that `train.py --help all` lists, without dashes."
    return f"unknown key `{key}`. {f'Did you mean `{close[0]}`?' if close else listed}"


def _unknown_heading(key: str) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), _HEADINGS, n=1)
    hint = f"Did you mean `{close[0]}:`?" if close else f"Use {', '.join(_HEADINGS)}, or no heading at all."
    return f"`{key}:` is no section of flags. {hint}"


def _refuse(path: str, line: int, message: str) -> NoReturn:
    raise ConfigError(f"{path}, line {line}: {message}")
