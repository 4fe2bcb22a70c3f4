"""Beginnings that answers are given, for sampling from further and further along a known text.

A beginning is a list of token ids that both models read after their own prompts; what they read is then the same on
both sides whatever their prompts end with, and it is what training reads too: the prompt's tokens, then the answer's.
A share of a reference is cut between two of the reference's tokens, so the sampled part starts where the tokenizer
would have started a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opd.config.flags import ConfigError
from opd.data.prompt_files import PromptDataError, Row
from opd.data.teacher_prompts import SHOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The first ``fraction`` of ``text``'s tokens."""

    text: str = ""
    fraction: float = 1.0

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        if not self.text:
            return []
        ids = tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids[: math.floor(self.fraction * len(ids))])


@dataclass(frozen=True, kw_only=True)
class PrefixPlan:
    """
    Args:
        key: field with the reference text of ``fractions``.
        fractions: of the reference's tokens, in [0, 1); 0 is an answer from its start.
        list_key: field with whole beginnings, a text or a list of texts.

    Raises:
        ConfigError: flags that do not go together, or a fraction out of range.
    """

    key: str | None = None
    fractions: tuple[float, ...] = ()
    list_key: str | None = None

    def __post_init__(self) -> None:
        shown = f"`--prefix-fractions {' '.join(f'{f:g}' for f in self.fractions)}`"
        if self.list_key is not None and (self.key is not None or self.fractions):
            raise ConfigError(
                f"`--prefixes-key={self.list_key}` and `--prefix-key` or `--prefix-fractions` both say how answers "
                "begin. Drop one of the two ways."
            )
        if self.fractions and self.key is None:
            raise ConfigError(
                f"{shown} needs `--prefix-key`. Name the field with the text to begin from, such as a known solution."
            )
        if self.key is not None and not self.fractions:
            raise ConfigError(
                f"`--prefix-key={self.key}` needs `--prefix-fractions`. Say how much is given, such as 0 0.25 0.5."
            )
        for fraction in self.fractions:
            if not 0 <= fraction < 1:
                raise ConfigError(
                    f"{shown}: {fraction:g} must be at least 0 and below 1, or nothing is left to write. Give shares "
                    "of the reference, such as 0 0.25 0.5."
                )
        if len(set(self.fractions)) < len(self.fractions):
            raise ConfigError(f"{shown} names one share twice. Use `--samples-per-prompt` for more answers from each.")

    def of_rows(self, rows: Sequence[Row], *, path: Path) -> list[tuple[Prefix, ...]]:
        """The beginnings of each row's answers, at least one.

        Raises:
            PromptDataError: a row whose field does not fit.
        """
        key = self.list_key or self.key
        if key is None:
            return [(Prefix(),)] * len(rows)
        found = [self._of_value(fields.get(key)) for _, fields in rows]
        bad = [(n, repr(f.get(key))[:SHOWN]) for (n, f), given in zip(rows, found, strict=True) if not given]
        if bad:
            flag, rule = ("--prefix-key", "text")
            if self.list_key is not None:
                flag, rule = ("--prefixes-key", "text, or a list of texts with at least one entry")
            raise PromptDataError.of_file(
                "--input", path, f"`{flag}={key}` names a field that must be {rule}", "Fix these rows.", bad
            )
        return found

    def _of_value(self, value: object) -> tuple[Prefix, ...]:
        """Empty: the value does not fit."""
        if self.list_key is None:
            fits = isinstance(value, str) and bool(value)
            return tuple(Prefix(text=value, fraction=f) for f in self.fractions) if fits else ()
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return ()
        return tuple(Prefix(text=text) for text in texts)
