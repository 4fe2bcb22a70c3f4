"""Ending an answer at a text rather than at a token id.

The decoders know ids only, so an answer is written to its end and cut afterwards: the tokens behind the cut cost time
and change nothing, because what comes later has no say in the probability of what stands before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


def cut_length(response_ids: Sequence[int], stop: Sequence[str], decode: Decode) -> int | None:
    """Number of tokens after which the text first contains one of ``stop``; None when it never does.

    Found by bisection: a text that contains a string goes on to contain it when tokens are added.

    Args:
        decode: keeps special tokens, so that one of them can be a stop string.
    """

    def has_stopped(length: int) -> bool:
        text = decode(response_ids[:length])
        return any(string in text for string in stop)

    if not stop or not has_stopped(len(response_ids)):
        return None
    return bisect_left(range(len(response_ids)), True, key=has_stopped)


def text_before(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of the stop strings in it."""
    return text[: min((at for string in stop if (at := text.find(string)) >= 0), default=len(text))]
