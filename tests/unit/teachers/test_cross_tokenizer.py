"""An answer in the teacher's tokens: what is compared with what, and what is left out."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from opd.teachers.cross_tokenizer import CrossTokenizer, Reading, end_of_answer
from opd.teachers.token_bytes import TokenBytes
from tests.unit.teachers.text_tokenizers import END, MARKER, START, byte_fallback, byte_level

pytestmark = pytest.mark.unit

FAMILIES: dict[str, Any] = {
    "english": byte_level("english"),
    "code": byte_level("code"),
    "fallback": byte_fallback(),
    "nfc": byte_level("code", nfc=True),
}
BYTES = {name: TokenBytes(tokenizer, shown=name) for name, tokenizer in FAMILIES.items()}
PAIRS = list(itertools.permutations(("english", "code", "fallback"), 2))


def crossing(student: str, teacher: str, *, teacher_has_end: bool = True) -> CrossTokenizer:
    end = FAMILIES[teacher].convert_tokens_to_ids(END)
    return CrossTokenizer(
        BYTES[student],
        BYTES[teacher],
        student_ends=[FAMILIES[student].convert_tokens_to_ids(END)],
        teacher_end=end if teacher_has_end else None,
    )


def ids_of(family: str, *pieces: str) -> list[int]:
    """Texts become their tokens, special tokens their id."""
    ids: list[int] = []
    for piece in pieces:
        special = piece in (END, START)
        ids += [FAMILIES[family].convert_tokens_to_ids(piece)] if special else BYTES[family].encode(piece)
    return ids


def texts_by_span(reading: Reading, response_ids: list[int], student: str, teacher: str) -> list[tuple[bytes, bytes]]:
    """What the two write in each span; an end is written as b"END"."""

    def write(family: str, ids: list[int], spans: list[int], k: int) -> bytes:
        end = FAMILIES[family].convert_tokens_to_ids(END)
        chosen = [i for i, span in zip(ids, spans, strict=True) if span == k]
        return b"".join(b"END" if i == end else BYTES[family].of(i) for i in chosen)

    count = max(reading.student_spans, default=-1) + 1
    ours = [write(student, response_ids, reading.student_spans, k) for k in range(count)]
    theirs = [write(teacher, reading.teacher_ids, reading.teacher_spans, k) for k in range(count)]
    return list(zip(ours, theirs, strict=True))


texts = st.text(max_size=40) | st.lists(
    st.sampled_from(["the apples", " that", "\n\tprint(", "14", " ", "漢", "ß"])
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=texts, pair=st.sampled_from(PAIRS), ended=st.booleans())
@example(text=" two  spaces", pair=("english", "fallback"), ended=True)
@example(text="", pair=("english", "code"), ended=True)
def test_spans_partition_any_text_that_the_student_writes(text: str, pair: tuple[str, str], ended: bool) -> None:
    student, teacher = pair
    if "\u2581" in text:  # a fallback tokenizer cannot tell it from a space
        return
    response = ids_of(student, text, *([END] if ended else []))
    reading = crossing(student, teacher).read(response)
    spans = texts_by_span(reading, response, student, teacher)
    assert all(ours == theirs for ours, theirs in spans)
    assert b"".join(ours for ours, _ in spans) == text.encode() + b"END" * ended
    assert -1 not in reading.student_spans
    assert reading.student_spans == sorted(reading.student_spans)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), pair=st.sampled_from(PAIRS))
def test_whatever_ids_the_student_writes_only_whole_text_at_the_start_is_compared(
    data: st.DataObject, pair: tuple[str, str]
) -> None:
    """Characters in pieces, special tokens in the middle, spellings that no tokenizer makes."""
    student, teacher = pair
    response = data.draw(st.lists(st.integers(0, len(FAMILIES[student]) - 1), min_size=1, max_size=12))
    reading = crossing(student, teacher).read(response)
    matched = [span >= 0 for span in reading.student_spans]
    assert len(matched) == len(response)
    assert matched == sorted(matched, reverse=True)
    spans = texts_by_span(reading, response, student, teacher)
    assert all(ours == theirs and ours for ours, theirs in spans)
    assert sorted(set(reading.teacher_spans)) == list(range(len(spans)))


def test_the_ends_of_both_are_a_span_of_their_own() -> None:
    response = ids_of("english", "apples", END)
    reading = crossing("english", "code").read(response)
    assert reading.teacher_ids[-1] == FAMILIES["code"].convert_tokens_to_ids(END)
    assert reading.student_spans[-1] == reading.teacher_spans[-1] == max(reading.student_spans[:-1]) + 1


def test_an_end_that_the_teacher_does_not_know_is_not_compared() -> None:
    reading = crossing("english", "code", teacher_has_end=False).read(ids_of("english", "apples", END))
    assert reading.student_spans[-1] == -1 and -1 not in reading.student_spans[:-1]


def test_nothing_after_a_special_token_in_the_middle_is_compared() -> None:
    before = ids_of("fallback", "apples")
    response = [*before, *ids_of("fallback", START, " more", END)]
    reading = crossing("fallback", "english").read(response)
    assert [span >= 0 for span in reading.student_spans] == [i < len(before) for i in range(len(response))]
    assert FAMILIES["english"].decode(reading.teacher_ids) == "apples"


def test_an_added_token_that_is_text_is_read_as_text() -> None:
    response = ids_of("english", MARKER, "14")
    assert response[0] == FAMILIES["english"].convert_tokens_to_ids(MARKER)
    reading = crossing("english", "fallback").read(response)
    assert b"".join(BYTES["fallback"].of(i) for i in reading.teacher_ids) == b"<think>14"
    assert reading.student_spans[0] == 0 and reading.student_spans.count(0) == 1


def test_an_answer_that_the_teacher_would_read_as_another_text_is_left_out_and_told_once(caplog: Any) -> None:
    crossed = crossing("english", "nfc")
    response = ids_of("english", "e\u0301 apples", END)
    with caplog.at_level(logging.WARNING):
        readings = [crossed.read(response) for _ in range(2)]
    assert readings[0].student_spans == [-1] * len(response) and readings[0].teacher_ids == []
    assert readings[0].per_token([]) == [0.0] * len(response)
    assert [record.message for record in caplog.records] == [
        "an answer is not compared with the teacher: of nfc the tokens of the text write another text"
    ]


def test_each_spans_log_prob_is_spread_over_its_tokens() -> None:
    reading = Reading(teacher_ids=[1, 2, 3], student_spans=[0, 1, 1, -1], teacher_spans=[0, 0, 1])
    assert reading.per_token([-1.0, -0.5, -3.0]) == [-1.5, -1.5, -1.5, 0.0]


def test_the_end_of_an_answer() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level("code").backend_tokenizer, eos_token=END)
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    eos = tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert end_of_answer(tokenizer, [eos, newline], chat=True) == newline
    assert end_of_answer(tokenizer, [eos, newline], chat=False) == eos
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert end_of_answer(tokenizer, [eos, newline], chat=True) == eos
    tokenizer.eos_token = None
    assert end_of_answer(tokenizer, [7, 5], chat=False) == 5
    assert end_of_answer(tokenizer, [], chat=False) is None
