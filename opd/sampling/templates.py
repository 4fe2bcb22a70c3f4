"""What each model reads of a problem: pairs of prompt templates, filled in from the rows of the problems' file.

A problem is written once with every pair. Placeholders are those of ``train.py --opd-teacher-prompt-template``:
``{prompt}``, ``{label}`` and the row's own fields.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.config.flags import ConfigError
from opd.data.prompt_files import Row
from opd.data.teacher_prompts import prompts_from_template

logger = logging.getLogger(__name__)

TEACHER_FLAG, THETA_FLAG, FILE_FLAG = "--teacher-template", "--theta-template", "--templates"
PLAIN = "{prompt}"
EXAMPLE = f'`{TEACHER_FLAG} "{{prompt}} (Answer: {{label}})" {THETA_FLAG} "{{prompt}}"`'


@dataclass(frozen=True, kw_only=True)
class TemplatePair:
    teacher: str = PLAIN
    theta: str = PLAIN

    def prompts(
        self, rows: list[Row], *, input_key: str, label_key: str | None, metadata_key: str
    ) -> list[tuple[Any, Any]]:
        """(teacher's, student's) prompt of each row: text, or a list of chat messages.

        Raises:
            TeacherRowError: a row without a field that a template names.
        """
        keys = {"input_key": input_key, "label_key": label_key, "metadata_key": metadata_key}
        return list(
            zip(
                prompts_from_template(self.teacher, rows, flag=TEACHER_FLAG, **keys),
                prompts_from_template(self.theta, rows, flag=THETA_FLAG, **keys),
                strict=True,
            )
        )


def pairs_of(
    teacher_templates: Sequence[str], theta_templates: Sequence[str], file: str | Path | None = None
) -> tuple[TemplatePair, ...]:
    """The pairs that the flags give; without any, both models read the problem as it is.

    Raises:
        ConfigError: as many teacher's as student's templates are needed; a template or the file cannot be used.
    """
    if file is not None:
        if teacher_templates or theta_templates:
            raise ConfigError(
                f"`{FILE_FLAG}={file}` and `{TEACHER_FLAG}` or `{THETA_FLAG}` both give templates. Drop one of the two "
                "ways."
            )
        return read_pairs(Path(file))
    if len(teacher_templates) != len(theta_templates):
        raise ConfigError(
            f"`{TEACHER_FLAG}` is given {len(teacher_templates)} times and `{THETA_FLAG}` {len(theta_templates)} "
            f"times: templates come in pairs, the first with the first. Write {EXAMPLE}."
        )
    pairs = [TemplatePair(teacher=a, theta=b) for a, b in zip(teacher_templates, theta_templates, strict=True)]
    return _checked(pairs or [TemplatePair()])


def read_pairs(path: Path) -> tuple[TemplatePair, ...]:
    """The pairs of a YAML or JSON file: a list of mappings with ``teacher`` and ``theta``.

    Raises:
        ConfigError: the file is missing, is something else, or holds a template that cannot be used.
    """
    import yaml  # JSON is YAML

    shown = f"`{FILE_FLAG}={path}`"
    remedy = "Write a list, each entry with `teacher:` and `theta:`."
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{shown}: there is no such file. Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown} cannot be read: {error}. Check the path.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown} is neither YAML nor JSON: {error}. {remedy}") from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{shown} must hold a list of template pairs. {remedy}")
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or set(entry) != {"teacher", "theta"}:
            found = ", ".join(map(str, entry)) if isinstance(entry, dict) else repr(entry)
            raise ConfigError(
                f"{shown}: entry {number} must have `teacher` and `theta` alone (found {found}). {remedy}"
            )
        if not all(isinstance(value, str) for value in entry.values()):
            raise ConfigError(f"{shown}: both templates of entry {number} must be text. Put them in quotes.")
    return _checked([TemplatePair(**entry) for entry in entries])


def warn_of_shown_labels(pairs: Sequence[TemplatePair], label_key: str | None) -> None:
    """A student that reads the answer while the data is made will not have it when it is trained."""
    for pair in pairs:
        shown = sorted(_names(pair.theta) & {"label", label_key})
        if shown:
            logger.warning(
                "`%s=%s` shows the student the answer ({%s}): its half of the mixture is then no longer what it writes "
                "by itself. Meant for the teacher's template?",
                *(THETA_FLAG, pair.theta, shown[0]),
            )


def names_label(pairs: Sequence[TemplatePair]) -> bool:
    return any("label" in _names(text) for pair in pairs for text in (pair.teacher, pair.theta))


def _checked(pairs: list[TemplatePair]) -> tuple[TemplatePair, ...]:
    for pair in pairs:
        _check(TEACHER_FLAG, pair.teacher)
        _check(THETA_FLAG, pair.theta)
    return tuple(pairs)


def _check(flag: str, template: str) -> None:
    shown = f"`{flag}={template}`"
    remedy = "Write placeholders as {prompt}, {label} or {field}, and a brace of the text as {{ or }}."
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(f"{shown} cannot be read ({error}). {remedy}") from error
    if not parts:
        raise ConfigError(f"{shown} names no field: every problem would get the same prompt. {remedy}")
    if any(not name or form or conversion for _, name, form, conversion in parts):
        raise ConfigError(f"{shown}: a placeholder must be the plain name of a field, without a format. {remedy}")


def _names(template: str) -> set[str | None]:
    return {name for _, name, _, _ in string.Formatter().parse(template)} - {None}
