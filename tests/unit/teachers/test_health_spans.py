"""What a health report says of a teacher that reads other token ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd.errors import TeacherError
from opd.teachers.cross_tokenizer import CrossTokenizer
from opd.teachers.health_rows import Verdict
from opd.teachers.health_spans import answers_in, probe_answers, spans_row
from opd.teachers.token_bytes import TokenBytes
from tests.unit.teachers.text_tokenizers import END, byte_level

pytestmark = pytest.mark.unit

STUDENT, TEACHER = byte_level("english"), byte_level("code")
STUDENT_END = STUDENT.eos_token_id


@pytest.fixture
def text() -> CrossTokenizer:
    student, teacher = TokenBytes(STUDENT, shown="student"), TokenBytes(TEACHER, shown="teacher")
    return CrossTokenizer(student, teacher, student_ends=[STUDENT_END], teacher_end=TEACHER.eos_token_id)


def test_the_share_that_is_in_spans_is_counted_by_hand(text: CrossTokenizer) -> None:
    """The teacher spells "the" in letters; the second answer has a special token before its last two."""
    whole = [*STUDENT.encode("the apples"), STUDENT_END]
    cut = [*STUDENT.encode("the apples"), STUDENT_END, *STUDENT.encode("qz")]
    row = spans_row(text, [whole, cut], least=0.9, of_a_run=True)
    assert len(whole) == 3 and len(cut) == 5
    assert row.numbers["coverage"] == pytest.approx((3 + 2) / (3 + 5))
    assert row.numbers["spans"] == 3 + 2
    assert row.numbers["student_tokens_per_span"] == 1.0
    assert row.numbers["teacher_tokens_per_span"] == (5 + 4) / 5
    assert row.found.startswith("62.5% of 8 tokens compared")
    assert row.verdict is Verdict.FAIL
    assert "--opd-min-token-coverage=0.9" in row.remedy


def test_all_of_the_probe_lines_can_be_compared(text: CrossTokenizer) -> None:
    row = spans_row(text, probe_answers(STUDENT, STUDENT_END), least=0.9, of_a_run=False)
    assert row.verdict is Verdict.PASS and row.remedy == ""
    assert row.numbers["coverage"] == 1.0


def test_a_text_that_is_not_the_runs_fails_no_teacher(text: CrossTokenizer) -> None:
    row = spans_row(text, [[STUDENT_END, *STUDENT.encode("text")]], least=0.9, of_a_run=False)
    assert row.verdict is Verdict.WARN
    assert "--answers" in row.remedy


def test_answers_of_a_file_are_taken_as_ids_or_as_text(tmp_path: Path) -> None:
    file = tmp_path / "step_00001.jsonl"
    rows = [{"token_ids": [5, 6, 7], "response": "not looked at"}, {"response": "14", "token_ids": None}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert answers_in(file, STUDENT, STUDENT_END) == [[5, 6, 7], [*STUDENT.encode("14"), STUDENT_END]]
    assert STUDENT.decode([STUDENT_END]) == END


@pytest.mark.parametrize(("content", "words"), [("", "holds no answers"), ('{"answer": "14"}\n', "line 1: an object")])
def test_a_file_without_answers_is_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(content)
    with pytest.raises(TeacherError, match=words):
        answers_in(file, STUDENT, STUDENT_END)
