r"""The answer of a response to a mathematics question as text: its last ``\boxed{}``, and whether that can be one."""

from __future__ import annotations

import re

MAX_LENGTH = 1000  # characters in a box; the answers of MATH and its like stay under 200
MAX_NESTING = 10  # brackets in brackets; usual answers stay under 6

_BOX = "\\boxed{"
_BOX_OR_BRACE = re.compile(r"\\boxed\{|[{}]")
_BRACKET = re.compile(r"[([{)\]}]")
# Nested without a bracket: a^b^c^d, \sin\sin\sin x
_CHAIN = re.compile(r"(?:\^\s*\w+\s*)+|(\\[a-zA-Z]+)(?:\s*\1)+")


def last_boxed(text: str) -> str | None:
    r"""The last ``\boxed{...}`` of the text, braces matched; None without a complete one. One pass."""
    last = (-1, -1)
    open_at: list[tuple[int, bool]] = []  # where each open brace's token starts, and whether that is a box
    for token in _BOX_OR_BRACE.finditer(text):
        if token[0] != "}":
            open_at.append((token.start(), token[0] == _BOX))
        elif open_at:
            start, is_box = open_at.pop()
            if is_box and start > last[0]:
                last = (start, token.end())
    return text[slice(*last)] if last[0] >= 0 else None


def degenerate(response: str, label: str) -> str | None:
    """Why the response's answer is no answer, in words; None where it may be one.

    The parser takes seconds to hours on deep or long expressions, which a model stuck in a loop does write. So a box
    with over ``MAX_LENGTH`` characters, or nested over ``MAX_NESTING`` deep, is refused unread, unless the label's own
    answer is as long or as deep. A response without a box has no bound on its length, and a bracket that it leaves
    open does not count: prose has such.
    """
    answer, reference = _inside(last_boxed(response)), _inside(last_boxed(label)) or label
    if answer is not None and len(answer) > max(MAX_LENGTH, len(reference)):
        return f"its box has {len(answer)} characters, over {MAX_LENGTH}"
    depth = nesting(response if answer is None else answer, count_unclosed=answer is not None)
    if depth > MAX_NESTING and depth > nesting(reference, count_unclosed=True):
        return f"it is nested {depth} deep, over {MAX_NESTING}"
    return None


def nesting(text: str, *, count_unclosed: bool) -> int:
    """How deep brackets of any kind, unbraced powers, or one command repeated lie in each other."""
    depths = [0]  # of what is closed inside each open bracket, the innermost last
    for bracket in _BRACKET.findall(text):
        if bracket in "([{":
            depths.append(0)
        elif len(depths) > 1:  # a closing bracket without its opening one says nothing
            _close(depths)
    while count_unclosed and len(depths) > 1:
        _close(depths)
    chains = (chain[0].count(chain[1] or "^") for chain in _CHAIN.finditer(text))
    return max(*depths, max(chains, default=0), 0)


def _close(depths: list[int]) -> None:
    closed = depths.pop() + 1
    depths[-1] = max(depths[-1], closed)


def _inside(box: str | None) -> str | None:
    return None if box is None else box[len(_BOX) : -1]
