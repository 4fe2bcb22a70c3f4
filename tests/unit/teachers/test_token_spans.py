"""Cuts of one text in two tokenizations, by hand and against their definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.teachers.token_spans import align, readable

pytestmark = pytest.mark.unit


def test_by_hand() -> None:
    spans = align([b"the", b" app", b"les", b"!"], [b"the", b" a", b"pples!"])
    assert (spans.student_T, spans.teacher_U, spans.count) == ([0, 1, 1, 1], [0, 1, 1], 2)


def test_a_character_split_over_tokens_is_one_span() -> None:
    spans = align([b"\xe6", b"\xbc\xa2", b"a"], [b"\xe6\xbc", b"\xa2", b"a"])
    assert (spans.student_T, spans.teacher_U) == ([0, 0, 1], [0, 0, 1])


def test_tokens_of_no_bytes() -> None:
    spans = align([b"", b"a", b"", b"b"], [b"ab"])
    assert (spans.student_T, spans.count) == ([0, 0, 0, 0], 1)
    assert align([b"a", b"", b"b", b""], [b"a", b"b"]).student_T == [0, 0, 1, 1]
    assert align([b""], []).student_T == [-1]


def test_other_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="different bytes"):
        align([b"a"], [b"b"])


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


places = st.lists(st.integers(min_value=0, max_value=50), max_size=8)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=20), places, places)
def test_spans_are_cut_at_the_common_boundaries_and_nowhere_else(
    data: bytes, first: list[int], second: list[int]
) -> None:
    student, teacher = cut(data, first), cut(data, second)
    spans = align(student, teacher)
    ours, theirs = ([b"".join(p for p, s in zip(side, of, strict=True) if s == k) for k in range(spans.count)]
                    for side, of in ((student, spans.student_T), (teacher, spans.teacher_U)))  # fmt: skip
    assert ours == theirs and b"".join(ours) == data

    def ends(pieces: list[bytes]) -> set[int]:
        return {len(b"".join(pieces[:i])) for i in range(1, len(pieces) + 1)} - {0}

    assert ends(ours) == ends(student) & ends(teacher)


def test_what_can_be_read_ends_at_a_special_token() -> None:
    written = readable([b"a", b"b", None, b"c"])
    assert (written.count, written.text) == (2, "ab")


@pytest.mark.parametrize(
    ("pieces", "count", "text"),
    [
        ([b"a", b"\xe6\xbc"], 1, "a"),  # cut by the length limit
        ([b"a", b"\xe6", b"\xbc\xa2b\xe6", b"\xbc"], 1, "a"),  # no token ends where the last whole character does
        ([b"a\xe6", b"\xbc\xa2", b"\xff", b"b"], 2, "a漢"),
        ([b"\xff"], 0, ""),
        ([b"a", b"", b"b"], 3, "ab"),
        ([], 0, ""),
    ],
)
def test_what_can_be_read_ends_with_a_whole_token_and_a_whole_character(
    pieces: list[bytes], count: int, text: str
) -> None:
    written = readable(pieces)
    assert (written.count, written.text) == (count, text)
