"""What a prompt file says to the teachers: which one scores a row, and what it reads instead of the student's prompt.

A teacher that sees more than the student (the reference answer, a hint, another system message) knows better what to
write next; the response's tokens are the same under both prompts.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd.data.prompt_files import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 60  # characters of a bad value
BadRows = list[tuple[int, str]]


class TeacherRowError(Exception):
    """Rows that break a rule; the prompt file's reader adds its name.

    Attributes:
        rule, remedy: as in ``PromptDataError.of_file``.
        bad_rows: (row number, what is wrong with it).
    """

    def __init__(self, rule: str, remedy: str, bad_rows: BadRows) -> None:
        super().__init__(rule)
        self.rule, self.remedy, self.bad_rows = rule, remedy, bad_rows


@dataclass(frozen=True, kw_only=True)
class TeacherPrompts:
    """
    Args:
        prompt_key: field with the teacher's prompt.
        template: the teacher's prompt with placeholders for fields of the row; in a chat it takes the place of the last
            user message.
        system_prompt: system message of the teacher's chat, in place of the row's own.
        route_key: metadata field with the name of the row's teacher, one of ``names``.
        names: teachers in the order of ``opd.config.teachers``.
        positions: tokens that each teacher can read; empty: not known.
        max_response_len: tokens of the longest answer.
        tokenizer: of a teacher that reads every prompt in its own tokens; None: the student's.
        flags: what the names of the prompt flags begin with, for messages.
        who: what messages call this teacher.
    """

    prompt_key: str | None = None
    template: str | None = None
    system_prompt: str | None = None
    route_key: str | None = None
    names: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    max_response_len: int = 1
    tokenizer: PreTrainedTokenizerBase | None = None
    flags: str = "--opd-teacher"
    who: str = "the teacher"

    @property
    def shown(self) -> tuple[str | None, str | None, str | None]:
        """What makes its prompt differ from the student's; nothing when all are None."""
        return self.prompt_key, self.template, self.system_prompt

    @property
    def has_prompts(self) -> bool:
        return self.shown != (None, None, None) or self.tokenizer is not None

    def routes(self, rows: list[Row], metadata_key: str) -> list[int]:
        """The index of each row's teacher; 0 without routing.

        Raises:
            TeacherRowError: a row that names no teacher, or one that there is not.
        """
        if self.route_key is None:
            return [0] * len(rows)
        found = [(number, (fields.get(metadata_key) or {}).get(self.route_key)) for number, fields in rows]
        bad = [
            (number, "it has none" if name is None else repr(name)[:SHOWN])
            for number, name in found
            if name not in self.names
        ]
        if bad:
            raise TeacherRowError(
                f"`--opd-teacher-key={self.route_key}` must name each row's teacher in its `{metadata_key}`, one of "
                f"{', '.join(self.names)}",
                "Correct these rows, or add the teacher to --opd-teachers.",
                bad,
            )
        return [self.names.index(name) for _, name in found]

    def values(self, rows: list[Row], *, input_key: str, label_key: str | None, metadata_key: str) -> list[Any]:
        """The teacher's prompt of each row before tokenization: text, or a list of chat messages.

        Raises:
            TeacherRowError: a row without the field, or with one that is no prompt.
        """
        if self.prompt_key is not None:
            bad = [(n, repr(f.get(self.prompt_key))[:SHOWN]) for n, f in rows if not is_prompt(f.get(self.prompt_key))]
            if bad:
                raise TeacherRowError(
                    f"`{self.flags}-prompt-key={self.prompt_key}` names a field that must be text or a list of chat "
                    "messages ({role, content})",
                    "Fix these rows, or name another field.",
                    bad,
                )
            values = [fields[self.prompt_key] for _, fields in rows]
        elif self.template is not None:
            values = prompts_from_template(
                self.template,
                rows,
                flag=f"{self.flags}-prompt-template",
                input_key=input_key,
                label_key=label_key,
                metadata_key=metadata_key,
            )
        else:
            values = [fields[input_key] for _, fields in rows]
        return values if self.system_prompt is None else [self._with_system(value) for value in values]

    def fits(self, tokens: int, teacher: int) -> bool:
        """Whether that teacher, or every one when samples are not routed, has positions for so many tokens."""
        if not self.positions:
            return True
        limit = self.positions[teacher] if self.route_key is not None else min(self.positions)
        return tokens <= limit

    def _with_system(self, value: Any) -> list[dict[str, Any]]:
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        return [{"role": "system", "content": self.system_prompt}, *rest]


def prompts_from_template(
    template: str, rows: list[Row], *, flag: str, input_key: str, label_key: str | None, metadata_key: str
) -> list[Any]:
    """The template filled in for each row: a text where the row's prompt is one, else the row's chat with its last user
    message replaced.

    Args:
        flag: that gave the template, for messages.

    Raises:
        TeacherRowError: a row without one of the fields.
    """
    parts = [(text, name) for text, name, _, _ in string.Formatter().parse(template)]
    values, bad = [], []
    for number, fields in rows:
        known = _placeholders(fields, input_key, label_key, metadata_key)
        unknown = sorted({name for _, name in parts if name is not None and known.get(name) is None})
        if unknown:
            bad.append(
                (number, f"no {', '.join(unknown)}; it has {', '.join(k for k in known if known[k] is not None)}")
            )
        else:
            filled = "".join(text + ("" if name is None else known[name]) for text, name in parts)
            values.append(_with_last_user_message(fields[input_key], filled))
    if bad:
        raise TeacherRowError(
            f"`{flag}={template}` names fields that {len(bad)} of {len(rows)} rows lack",
            "Use fields that every row has; {prompt} is the student's, {label} that of --label-key.",
            bad,
        )
    return values


def is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(message, dict) and "role" in message for message in value)
    return isinstance(value, str)


def as_text(value: Any) -> str:
    """Reward rules compare text; numbers and lists in the file become the text JSON has for them."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _placeholders(
    fields: dict[str, Any], input_key: str, label_key: str | None, metadata_key: str
) -> dict[str, str | None]:
    """Name -> text, in the order in which one name hides another."""
    known: dict[str, str | None] = {"prompt": _prompt_text(fields[input_key])}
    if label_key is not None:
        known["label"] = as_text(fields[label_key])
    for source in (fields, fields.get(metadata_key) or {}):
        for name, value in source.items():
            known.setdefault(name, None if value is None else as_text(value))
    return known


def _prompt_text(value: Any) -> str | None:
    """A text prompt itself; of a chat, the last user message."""
    if isinstance(value, str):
        return value
    contents = [message.get("content") for message in value if message["role"] == "user"]
    return contents[-1] if contents and isinstance(contents[-1], str) else None


def _with_last_user_message(value: Any, text: str) -> Any:
    if isinstance(value, str):
        return text
    users = [i for i, message in enumerate(value) if message["role"] == "user"]
    if not users:
        return [*value, {"role": "user", "content": text}]
    return [*value[: users[-1]], {**value[users[-1]], "content": text}, *value[users[-1] + 1 :]]
