"""One text, two tokenizations: spans of bytes at whose ends both have a token boundary. Pure functions.

Shape legend: T the student's tokens, U the teacher's tokens of the same text, C spans, numbered from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np


@dataclass(frozen=True, kw_only=True)
class AlignedSpans:
    """Each span's bytes are written by whole tokens of both."""

    student_T: list[int]  # the span of each token; -1 only where there is no text at all
    teacher_U: list[int]
    count: int  # C


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a response's tokens write, as far as it is a text: ``count`` tokens write ``text``."""

    count: int
    text: str


def readable(pieces: Sequence[bytes | None]) -> Written:
    """The longest run of whole tokens from the start on that write valid UTF-8.

    It ends at a special token (None): the teacher would not see that token, so what follows would be scored after
    another text than the student wrote. It ends before a character that is not finished, as the length limit leaves.
    """
    run = list(pieces[: pieces.index(None)]) if None in pieces else list(pieces)
    data = b"".join(run)
    try:
        data.decode()
        valid = len(data)
    except UnicodeDecodeError as error:
        valid = error.start
    ends = [0, *accumulate(map(len, run))]
    # Within the valid part a byte 10xxxxxx continues a character; a boundary in front of it is inside one.
    whole = [i for i, end in enumerate(ends) if end <= valid and (end == valid or data[end] & 0xC0 != 0x80)]
    return Written(count=whole[-1], text=data[: ends[whole[-1]]].decode())


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> AlignedSpans:
    """Cut at every byte offset that is a token boundary of both. A token of no bytes belongs to the span that ends
    where it is, at the very start to the first.

    Raises:
        ValueError: they write different bytes.
    """
    if b"".join(student) != b"".join(teacher):
        raise ValueError("the two tokenizations write different bytes")
    student_ends, teacher_ends = (np.cumsum([len(piece) for piece in side], dtype=int) for side in (student, teacher))
    cuts_C = np.intersect1d(student_ends, teacher_ends)
    cuts_C = cuts_C[cuts_C > 0]
    return AlignedSpans(
        student_T=(np.searchsorted(cuts_C, student_ends) if len(cuts_C) else student_ends - 1).tolist(),
        teacher_U=np.searchsorted(cuts_C, teacher_ends).tolist(),
        count=len(cuts_C),
    )
