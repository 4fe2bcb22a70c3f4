"""Row of a prompt file -> Prompt: which fields must be there, chat template, tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.data.prompt_files import PromptDataError, Row, read_rows
from opd.data.teacher_prompts import SHOWN, TeacherPrompts, TeacherRowError, as_text, is_prompt
from opd.data.tokenizer import leading_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Prompt:
    index: int  # row number in the file, from 1
    text: str  # as tokenized: after the chat template
    ids: tuple[int, ...]
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    teacher_index: int = 0  # which of the run's teachers scores it, when prompts are routed
    teacher_ids: tuple[int, ...] | None = None  # what the teacher reads instead of ``ids``
    mixture_ids: tuple[int, ...] | None = None  # the same of the teacher that helps to write


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """A prompt file and how to read it. ``eval_prefix`` ("eval-" or "") only changes which flags the messages name.

    ``chat_template_variables``: for the chat template, besides the messages.
    ``teacher``: what the teachers are told about a row; evaluation has none. ``mixture``: the same of the teacher that
    helps to write, if there is one.
    """

    path: Path
    input_key: str
    label_key: str | None
    metadata_key: str
    apply_chat_template: bool
    eval_prefix: str = ""
    chat_template_variables: dict[str, Any] = field(default_factory=dict)
    teacher: TeacherPrompts | None = None
    mixture: TeacherPrompts | None = None

    @property
    def flag(self) -> str:
        return f"--{self.eval_prefix}prompt-data"

    def error(self, rule: str, remedy: str, bad_rows: list[tuple[int, str]] | None = None) -> PromptDataError:
        return PromptDataError.of_file(self.flag, self.path, rule, remedy, bad_rows)

    def check_same(self, digest: str, saved: str, what: str) -> None:
        """Before a cursor is moved to a saved place among ``what``.

        Raises:
            PromptDataError: what the file gives now is not what it gave to the saved run.
        """
        if digest != saved:
            raise self.error(
                f"its {what} are not those of the checkpoint (digest {digest}, saved {saved}), so the saved position "
                "means nothing",
                "Give back that run's file, tokenizer, chat template and length limits, or pass --finetune to start at "
                "step 0 from its weights.",
            )

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """Every row as a prompt, tokenized in one batch.

        Raises:
            PromptDataError: a row breaks a rule; the message names the first few that do.
        """
        rows = read_rows(self.path, flag=self.flag)
        self._check_fields(rows)
        try:
            routes = self.teacher.routes(rows, self.metadata_key) if self.teacher else [0] * len(rows)
            values = [self._teacher_values(rows, teacher) for teacher in (self.teacher, self.mixture)]
        except TeacherRowError as error:
            raise self.error(error.rule, error.remedy, error.bad_rows) from error
        texts, token_ids = self._tokenized_prompts(rows, [fields[self.input_key] for _, fields in rows], tokenizer)
        teacher_ids, mixture_ids = [
            [None] * len(rows) if of_teacher is None else self._teacher_ids(rows, of_teacher, teacher, tokenizer)
            for of_teacher, teacher in zip(values, (self.teacher, self.mixture), strict=True)
        ]
        return [
            Prompt(
                index=number,
                text=texts[i],
                ids=token_ids[i],
                label=None if self.label_key is None else as_text(fields[self.label_key]),
                metadata=fields.get(self.metadata_key) or {},
                teacher_index=routes[i],
                teacher_ids=teacher_ids[i],
                mixture_ids=mixture_ids[i],
            )
            for i, (number, fields) in enumerate(rows)
        ]

    def _teacher_values(self, rows: list[Row], teacher: TeacherPrompts | None) -> list[Any] | None:
        if teacher is None or not teacher.has_prompts:
            return None
        return teacher.values(rows, input_key=self.input_key, label_key=self.label_key, metadata_key=self.metadata_key)

    def _teacher_ids(
        self, rows: list[Row], prompts: list[Any], teacher: TeacherPrompts, tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[int, ...]]:
        """In the student's tokens, or in the teacher's own: then with what its tokenizer puts in front of a text (as
        <s>), which a chat template writes itself."""
        if teacher.tokenizer is None:
            return self._tokenized_prompts(rows, prompts, tokenizer)[1]
        _, ids = self._tokenized_prompts(rows, prompts, teacher.tokenizer, flag="--opd-teacher-tokenizer")
        front = () if self.apply_chat_template else leading_ids(teacher.tokenizer)
        return [(*front, *prompt_ids) for prompt_ids in ids]

    def _tokenized_prompts(
        self,
        rows: list[Row],
        prompts: list[Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        flag: str = "--hf-checkpoint",
    ) -> tuple[list[str], list[tuple[int, ...]]]:
        """(texts after the chat template, their token ids) of text prompts or lists of messages."""
        numbered = [(number, prompt) for (number, _), prompt in zip(rows, prompts, strict=True)]
        texts = self._render(numbered, tokenizer, flag)
        token_ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        empty = [(number, "no tokens") for (number, _), ids in zip(rows, token_ids, strict=True) if not ids]
        if empty:
            raise self.error("a prompt must have at least one token", "Delete these rows.", empty)
        return texts, [tuple(ids) for ids in token_ids]

    def _check_fields(self, rows: list[Row]) -> None:
        self._check_present(rows, self.input_key, f"--{self.eval_prefix}input-key", "")
        self._check(rows, self.input_key, is_prompt, "must be text or a list of chat messages ({role, content})")
        if self.label_key is not None:
            flag = f"--{self.eval_prefix}label-key"
            self._check_present(rows, self.label_key, flag, f", or drop `{flag}` when no reward needs a label")
        self._check(rows, self.metadata_key, lambda value: value is None or isinstance(value, dict), "must be a dict")

    def _check_present(self, rows: list[Row], key: str, flag: str, way_out: str) -> None:
        lacking = [(number, f"its keys are {', '.join(fields)}") for number, fields in rows if fields.get(key) is None]
        if lacking:
            rule = f"`{flag}={key}` names a field that {len(lacking)} of {len(rows)} rows lack"
            raise self.error(rule, f"Choose one of the existing keys with `{flag}`{way_out}.", lacking)

    def _check(self, rows: list[Row], key: str, is_good: Callable[[Any], bool], rule: str) -> None:
        bad = [(number, repr(fields.get(key))[:SHOWN]) for number, fields in rows if not is_good(fields.get(key))]
        if bad:
            raise self.error(f"field `{key}` {rule}", "Fix these rows, or name another field.", bad)

    def _render(self, values: list[tuple[int, Any]], tokenizer: PreTrainedTokenizerBase, flag: str) -> list[str]:
        if self.apply_chat_template:
            return self._render_chats(values, tokenizer, flag)
        lists = [(number, f"{len(value)} messages") for number, value in values if not isinstance(value, str)]
        if lists:
            rule = "prompts that are lists of chat messages need `--apply-chat-template`"
            raise self.error(rule, "Add that flag, or give the prompts as text.", lists)
        return [value for _, value in values]

    def _render_chats(self, values: list[tuple[int, Any]], tokenizer: PreTrainedTokenizerBase, flag: str) -> list[str]:
        """``flag``: that names the tokenizer, for messages."""
        if not tokenizer.chat_template:
            raise self.error(
                f"`--apply-chat-template` needs a tokenizer with a chat template, and that of {flag} has none",
                "Drop the flag, or put a chat_template.jinja beside tokenizer_config.json.",
            )
        import jinja2  # what chat templates are written in; comes with transformers

        texts = []
        for number, value in values:
            messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
            try:
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self.chat_template_variables
                )
            except jinja2.TemplateError as error:
                rule = "the tokenizer's chat template refuses a prompt"
                raise self.error(rule, "Fix the messages.", [(number, str(error))]) from error
            texts.append(text)
        return texts
