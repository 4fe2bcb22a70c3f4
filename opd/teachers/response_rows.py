"""Rows of prompts with responses -> token ids, one row at a time: one that cannot be read is told, the rest go on.

Token ids come out as in training: prompts as those of --prompt-data, responses as those of --sft-data (a text gets the
end-of-text id when it does not end with one, ids are taken as they are), so that their scores are found there again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.data.prompt_files import PromptDataError
from opd.data.teacher_prompts import is_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INPUT = "--input"
# Fields that are looked for when none is named, the exact ones first; tools/generate_mixture_data.py writes the second.
PROMPT_FIELDS = ("prompt_ids", "student_prompt_ids", "prompt", "input")
RESPONSE_FIELDS = ("response_ids", "response", "completion")
SHOWN = 60  # characters of a bad value


class RowError(Exception):
    """Why one row has no score."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """``number`` counts from 1: lines of JSONL, rows of parquet. ``fields`` is a RowError where the line is no row."""

    number: int
    fields: dict[str, Any] | RowError

    @property
    def id(self) -> str:
        """Another one when the row's content changes."""
        text = json.dumps(self.fields, sort_keys=True, default=str)
        return f"{self.number}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def read_rows_singly(path: Path) -> Iterator[Row]:
    """Every row that is not blank, read as it is needed.

    Raises:
        PromptDataError: there is no such file, or it is of no known kind.
    """
    if not path.is_file():
        raise PromptDataError.of_file(INPUT, path, "no such file", "Check the path.")
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    rule = "the name must end in .jsonl or .parquet, which says how to read it"
    raise PromptDataError.of_file(INPUT, path, rule, "Rename or convert the file.")


def count_rows(path: Path) -> int:
    """Lines of JSONL, blank ones too, or rows of parquet: for a progress bar, quickly."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    import pyarrow.lib
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """
    Args:
        tokenizer: of the student, which is the teacher's.
        end_ids: token ids that end an answer.
        vocab_size: ids are below it.
        input_key, response_key: fields; None: the first of ``PROMPT_FIELDS`` and ``RESPONSE_FIELDS`` that a row has.
        apply_chat_template: to prompts that are text; messages always go through it.
    """

    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    vocab_size: int
    input_key: str | None = None
    response_key: str | None = None
    apply_chat_template: bool = False

    def ids(self, fields: dict[str, Any]) -> tuple[list[int], list[int]]:
        """(prompt ids, response ids), at least one each.

        Raises:
            RowError: what the row lacks.
        """
        key, prompt = _value(fields, self.input_key, PROMPT_FIELDS, "--input-key")
        prompt_ids = self._checked(key, prompt) if _looks_like_ids(prompt) else self._encoded(self._text(key, prompt))
        if not prompt_ids:
            raise RowError(f"`{key}` has no tokens, and the first token of a response follows one")
        key, response = _value(fields, self.response_key, RESPONSE_FIELDS, "--response-key")
        if _looks_like_ids(response):
            response_ids = self._checked(key, response)
        elif isinstance(response, str):
            response_ids = self._ended(self._encoded(response))
        else:
            raise RowError(f"`{key}` must be text or token ids, not {repr(response)[:SHOWN]}")
        if not response_ids:
            raise RowError(f"`{key}` has no tokens")
        return prompt_ids, response_ids

    def _text(self, key: str, prompt: Any) -> str:
        if not is_prompt(prompt):
            raise RowError(f"`{key}` must be text, chat messages or token ids, not {repr(prompt)[:SHOWN]}")
        if isinstance(prompt, str) and not self.apply_chat_template:
            return prompt
        if not self.tokenizer.chat_template:
            raise RowError(f"`{key}` is a chat, and the tokenizer has no chat template")
        import jinja2  # what chat templates are written in; comes with transformers

        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise RowError(f"the tokenizer's chat template refuses `{key}` ({error})") from error

    def _encoded(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        end = eos if eos in self.end_ids else next(iter(self.end_ids), None)
        return ids if not ids or end is None or ids[-1] in self.end_ids else [*ids, end]

    def _checked(self, key: str, ids: list[Any]) -> list[int]:
        bad = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < self.vocab_size]
        if bad:
            raise RowError(f"`{key}` holds {repr(bad[0])[:SHOWN]}, and token ids are below {self.vocab_size}")
        return list(ids)


def _value(fields: dict[str, Any], named: str | None, usual: tuple[str, ...], flag: str) -> tuple[str, Any]:
    for key in usual if named is None else (named,):
        if fields.get(key) is not None:
            return key, fields[key]
    wanted = f"`{named}`" if named is not None else " or ".join(f"`{key}`" for key in usual)
    raise RowError(f"no field {wanted} ({flag}); it has {', '.join(fields)[:SHOWN] or 'none'}")


def _looks_like_ids(value: Any) -> bool:
    return isinstance(value, list) and not (value and isinstance(value[0], dict))


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # byte-order mark
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):  # ValueError also covers bytes that are not UTF-8
                fields = None
            if not isinstance(fields, dict):
                fields = RowError(f"no JSON object: {line[:SHOWN].decode(errors='replace')!r}")
            yield Row(number=number, fields=fields)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.lib
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for fields in batch.to_pylist():
                number += 1
                yield Row(number=number, fields=fields)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> PromptDataError:
    rule = f"pyarrow cannot read it as parquet: {error}"
    return PromptDataError.of_file(INPUT, path, rule, "Write the file anew.")
