"""Rules that score an answer against the reference: ``--rm-type``. 1.0 is right, 0.0 is wrong."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

from opd.config.flags import ConfigError
from opd.rewards.math_grader import grade_math
from opd.types import Sample

MARKER = "#"
# An engine may leave the end-of-text token in the response: <eos>, </s>, <|im_end|>.
_TRAILING_SPECIAL_TOKENS = re.compile(r"(?:\s*<[|/]?\w+\|?>)+\s*$")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


async def rule_reward(args: Any, sample: Sample, **_: Any) -> float:
    """The reward of ``args.rm_type``'s rule.

    Raises:
        ConfigError: no such rule, or the sample has no label.
    """
    rule = RULES.get(args.rm_type)
    if rule is None:
        raise ConfigError(f"`--rm-type={args.rm_type}` is not a rule. Choose one of {', '.join(RULES)}.")
    if rule is math:  # may take seconds, during which teacher requests on the same event loop must go on
        return await asyncio.to_thread(rule, sample.response, sample.label)
    return rule(sample.response, sample.label)


def exact(response: str, label: str | None) -> float:
    """The whole response is the label, up to white space around it."""
    return float(_required(label, "exact").strip() in (text.strip() for text in _readings(response)))


def final_answer(response: str, label: str | None) -> float:
    """What follows the last ``#`` is the label: ``... # 23``, and GSM8K's ``... #### 23``.

    White space, thousands separators and a trailing period do not count. A label may itself be a whole solution with
    a marker, as GSM8K's are.
    """
    expected = _normal(_required(label, "final_answer").rpartition(MARKER)[2])
    found = (text.rpartition(MARKER) for text in _readings(response))
    return float(any(marker and _normal(answer) == expected for _, marker, answer in found))


def math(response: str, label: str | None) -> float:
    r"""The last ``\boxed{}``, or else the last expression, means the same as the label (math-verify)."""
    return grade_math(_without_special_tokens(response), _required(label, "math"))


RULES: dict[str, Callable[[str, str | None], float]] = {"exact": exact, "math": math, "final_answer": final_answer}


def _required(label: str | None, rule: str) -> str:
    if label is None:
        raise ConfigError(
            f"`--rm-type={rule}` compares with a reference answer, and the prompts have none. "
            "Name the field that holds it with `--label-key` (`--eval-label-key` for evaluation sets)."
        )
    return label


def _readings(response: str) -> tuple[str, str]:
    """As it is, and without what may be an end-of-text token: a right answer may end in ``<int>`` itself."""
    return response, _without_special_tokens(response)


def _without_special_tokens(response: str) -> str:
    return _TRAILING_SPECIAL_TOKENS.sub("", response)


def _normal(answer: str) -> str:
    answer = "".join(answer.split()).removesuffix(".")
    return _THOUSANDS.sub("", answer)
