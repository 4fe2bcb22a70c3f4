"""Which answers are kept. A filter looks at a record and says why it is dropped, or None.

Filters run in order and the first that objects gives the reason, so each dropped answer is counted once.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opd.config.flags import ConfigError
from opd.config.paths import check_function, load_function
from opd.rewards.rules import RULES
from opd.sampling.output import STOP

Record = dict[str, Any]
Filter = Callable[[Record], str | None]  # why the record is dropped; None: kept. It has a __name__

FILTER_FLAG = "--filter-path"


class FilterError(Exception):
    """A filter that could not judge a record.

    Attributes:
        name: of the filter.
        kind: the same for every record on which it failed in the same way, for counting.
    """

    def __init__(self, name: str, cause: Exception) -> None:
        self.name = name
        self.kind = f"{name} raised {type(cause).__name__}"
        super().__init__(f"{self.kind}: {cause}")


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """
    Args:
        min_tokens, max_tokens: of the answer, its given beginning included.
        min_chars, max_chars: of its text.
        require_answer: the label's text must stand in it.
        verify: rule of ``opd.rewards.rules`` that must call it right.
        require_finished: not cut at a length limit.
        path: ``module.function`` of a filter of the user's: it gets the record and, under ``fields``, the problem's
            row, and returns True to keep it, False to drop it, or a text: why it is dropped.

    Raises:
        ConfigError: a rule that cannot be applied.
    """

    min_tokens: int | None = None
    max_tokens: int | None = None
    min_chars: int | None = None
    max_chars: int | None = None
    require_answer: bool = False
    verify: str | None = None
    require_finished: bool = False
    path: str | None = None

    def __post_init__(self) -> None:
        for unit, low, high in (
            ("tokens", self.min_tokens, self.max_tokens),
            ("chars", self.min_chars, self.max_chars),
        ):
            for flag, value in ((f"--keep-min-{unit}", low), (f"--keep-max-{unit}", high)):
                if value is not None and value < 1:
                    raise ConfigError(f"`{flag}={value}` must be at least 1. Drop it for no limit.")
            if low is not None and high is not None and low > high:
                raise ConfigError(
                    f"`--keep-min-{unit}={low}` is above `--keep-max-{unit}={high}`: nothing would be kept. Swap them."
                )
        if self.verify is not None and self.verify not in RULES:
            raise ConfigError(f"`--verify={self.verify}` is not a rule. Choose one of {', '.join(RULES)}.")
        if self.verify == "math" and importlib.util.find_spec("math_verify") is None:
            raise ConfigError("`--verify=math` needs the package math-verify. Install it: pip install math-verify")
        if self.path is not None:
            check_function(self.path, flag=FILTER_FLAG)

    def check_label(self, label_key: str | None) -> None:
        """
        Raises:
            ConfigError: a filter compares with a label and there is none.
        """
        if label_key is not None:
            return
        for flag, given in (("--require-answer", self.require_answer), (f"--verify={self.verify}", self.verify)):
            if given:
                raise ConfigError(
                    f"`{flag}` compares with a reference answer. Name the field that holds it with `--label-key`."
                )

    def filters(self) -> list[Filter]:
        """Cheap ones first.

        Raises:
            ConfigError: the user's function cannot be imported.
        """
        found: list[Filter] = [_unfinished] if self.require_finished else []
        for noun, limits, size in (
            ("tokens", (self.min_tokens, self.max_tokens), lambda record: len(record["response"])),
            ("characters", (self.min_chars, self.max_chars), lambda record: len(record["response_text"])),
        ):
            if limits != (None, None):
                found.append(_size_filter(noun, *limits, size))
        if self.require_answer:
            found.append(_lacks_answer)
        if self.verify is not None:
            found.append(_verify_filter(self.verify))
        if self.path is not None:
            found.append(_users_filter(self.path))
        return found


class Judge:
    """
    Attributes:
        working: names of the filters that have judged a record.
    """

    def __init__(self, filters: list[Filter]) -> None:
        self._filters = filters
        self.working: set[str] = set()

    def __call__(self, record: Record) -> str | None:
        """Why the record is dropped; None when every filter keeps it.

        Raises:
            FilterError: one of them raised.
        """
        for check in self._filters:
            try:
                reason = check(record)
            except Exception as error:  # whatever a user's function raises, on one answer of thousands
                raise FilterError(check.__name__, error) from error
            self.working.add(check.__name__)
            if reason is not None:
                return reason
        return None


def contains_answer(text: str, label: str) -> bool:
    """The label stands in the text, in any case, and not inside a longer number or word: ``9`` is not in ``19 apples``
    or ``9.5``."""
    label = label.strip()
    if not label:
        return False
    return (
        re.search(_not_amid(label[0], before=True) + re.escape(label) + _not_amid(label[-1], before=False), text, re.I)
        is not None
    )


def _not_amid(edge: str, *, before: bool) -> str:
    """A look-around at the label's edge. Only ASCII letters count as part of a word: Chinese has no spaces."""
    if edge.isdigit():
        return r"(?<![0-9])(?<![0-9][.,])" if before else r"(?![0-9])(?![.,][0-9])"
    if edge.isascii() and edge.isalpha():
        return "(?<![A-Za-z])" if before else "(?![A-Za-z])"
    return ""


def _unfinished(record: Record) -> str | None:
    return None if record["finish_reason"] == STOP else "cut at the length limit"


def _size_filter(noun: str, low: int | None, high: int | None, size: Callable[[Record], int]) -> Filter:
    def check(record: Record) -> str | None:
        value = size(record)
        if low is not None and value < low:
            return f"under {low} {noun}"
        return f"over {high} {noun}" if high is not None and value > high else None

    return check


def _lacks_answer(record: Record) -> str | None:
    return None if contains_answer(record["response_text"], record["label"]) else "answer not in the text"


def _verify_filter(rule: str) -> Filter:
    def verify(record: Record) -> str | None:
        return None if RULES[rule](record["response_text"], record["label"]) == 1.0 else f"wrong by {rule}"

    return verify


def _users_filter(path: str) -> Filter:
    function = load_function(path, flag=FILTER_FLAG)

    def check(record: Record) -> str | None:
        verdict = function(record)
        if isinstance(verdict, str) and verdict:
            return verdict
        if verdict is None or isinstance(verdict, str) or verdict not in (True, False):
            raise TypeError(f"it returned {verdict!r}; True, False or a reason in words is needed")
        return None if verdict else f"rejected by {path}"

    check.__name__ = path
    return check
