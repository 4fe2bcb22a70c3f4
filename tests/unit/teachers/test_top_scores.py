"""Likely tokens of a served teacher: asked for in pieces, put together by position, refused when they do not fit."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import numpy as np
import pytest
import torch

from opd.config import student_support
from opd.teachers.sglang_teacher import SGLangTeacher, TeacherScoreError
from opd.teachers.top_scores import TopRequest, merged
from tests.unit.serving.fake_sglang import FakeSGLang, good_answer, logprob_of, top_of

pytestmark = pytest.mark.unit

TOKENS = [100, 102, 104, 106, 108, 110, 112]  # none of the fake's likeliest ids
LENGTH = 5
STUDENT = [[3, 40], [1, 41], [42, 40], [5, 43], [44, 3]]


def score(
    fake: FakeSGLang,
    support: str,
    *,
    student_ids: Any = STUDENT,
    tokens: Any = TOKENS,
    deadline_s: float = 300.0,
    **request: Any,
) -> Any:
    """(log-probs, top) or the error."""

    async def run() -> Any:
        async with fake.running():
            teacher = SGLangTeacher(fake.url, retries=0, deadline_s=deadline_s)
            asked = TopRequest(**{"count": 2, "support": support, "vocab_size": 200, **request})
            try:
                ids_TK = None if student_ids is None else torch.tensor(student_ids, dtype=torch.int32)
                return await teacher.score_top(tokens, LENGTH, asked, ids_TK)
            except TeacherScoreError as error:
                return error
            finally:
                await teacher.close()

    return asyncio.run(run())


def test_the_teachers_choice() -> None:
    fake = FakeSGLang()
    logprobs, top = score(fake, "teacher", student_ids=None)
    assert logprobs == [logprob_of(i, TOKENS[i]) for i in range(2, 7)]
    assert top.ids_TK.tolist() == [[1, 3]] * LENGTH
    expected = torch.tensor([[entry[0] for entry in top_of(i, 2)] for i in range(2, 7)])
    torch.testing.assert_close(top.logprobs_TK, expected)
    (request,) = fake.requests
    assert (request["logprob_start_len"], request["top_logprobs_num"]) == (1, 2)
    assert "token_ids_logprob" not in request


def test_a_server_that_answers_with_lists_says_the_same() -> None:
    def unpack(answer: dict[str, Any]) -> dict[str, Any]:
        request = {"input_ids": TOKENS, "logprob_start_len": 1, "top_logprobs_num": 2}
        return good_answer(request, packed=False)

    _, packed = score(FakeSGLang(), "teacher")
    _, nested = score(FakeSGLang(unpack), "teacher")
    assert torch.equal(packed.ids_TK, nested.ids_TK)
    torch.testing.assert_close(packed.logprobs_TK, nested.logprobs_TK)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
def test_the_students_choice_is_asked_for_in_pieces(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(student_support, "LEAST_POSITIONS", chunk)
    fake = FakeSGLang()
    logprobs, top = score(fake, "student")
    assert len(fake.requests) == -(-LENGTH // chunk)
    assert logprobs == [logprob_of(i, TOKENS[i]) for i in range(2, 7)]
    assert top.ids_TK.tolist() == STUDENT
    expected = [[-3.0 - logprob_of(2 + i, t) / 100 for t in row] for i, row in enumerate(STUDENT)]
    torch.testing.assert_close(top.logprobs_TK, torch.tensor(expected))
    first = fake.requests[0]
    assert first["token_ids_logprob"] == sorted({t for row in STUDENT[:chunk] for t in row})
    assert first["input_ids"] == TOKENS[: 2 + min(chunk, LENGTH)]
    assert "top_logprobs_num" not in first


def test_each_piece_has_the_time_of_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student_support, "LEAST_POSITIONS", 1)
    fake = FakeSGLang()
    fake.delay_s = 0.25  # five pieces one after another take 1.25 s
    _, top = score(fake, "student", deadline_s=1.0)
    assert top.ids_TK.tolist() == STUDENT


def test_the_union_names_a_token_once() -> None:
    _, top = score(FakeSGLang(), "union")
    assert top.ids_TK.tolist() == [[1, 3, -1, 40], [1, 3, -1, 41], [1, 3, 42, 40], [1, 3, 5, 43], [1, 3, 44, -1]]
    assert top.logprobs_TK[0, 0] == pytest.approx(top_of(2, 1)[0][0])
    assert top.logprobs_TK[2, 2] == pytest.approx(-3.0 - logprob_of(4, 42) / 100)


def test_merging_by_hand() -> None:
    teacher = (np.array([[7, 8]]), np.array([[-1.0, -2.0]]))
    student = (np.array([[8, 9]]), np.array([[-2.0, -3.0]]))
    top = merged([teacher, student])
    assert top.ids_TK.tolist() == [[7, 8, -1, 9]]
    assert top.logprobs_TK.tolist() == [[-1.0, -2.0, 0.0, -3.0]]
    assert merged([student]).ids_TK.tolist() == [[8, 9]]


def test_without_the_students_ids_its_support_cannot_be_scored() -> None:
    for ids in (None, STUDENT[:-1], [row[:1] for row in STUDENT]):
        fake = FakeSGLang()
        error = score(fake, "union", student_ids=ids)
        assert error.reason == "top"
        assert fake.requests == []


def nested(change: Any) -> Any:
    def fault(answer: dict[str, Any]) -> dict[str, Any]:
        request = {"input_ids": TOKENS, "logprob_start_len": 1, "top_logprobs_num": 2}
        result = good_answer(request, packed=False)
        change(result["meta_info"])
        return result

    return fault


def set_entry(row: int, entry: int, value: list[Any]) -> Any:
    def change(meta: dict[str, Any]) -> None:
        meta["input_top_logprobs"][row][entry] = value

    return nested(change)


def other_dtype(answer: dict[str, Any]) -> None:
    answer["meta_info"]["input_top_logprobs_val_flat_b64_dtype"] = "float16"


def torn(answer: dict[str, Any]) -> None:
    answer["meta_info"]["input_top_logprobs_idx_flat_b64"] = "AAAA"


@pytest.mark.parametrize(
    ("fault", "detail"),
    [
        (nested(lambda meta: meta.pop("input_top_logprobs")), "no rows"),
        (nested(lambda meta: meta["input_top_logprobs"].pop()), "no rows"),  # the null at the start moves in
        (nested(lambda meta: meta["input_top_logprobs"][2].pop()), "no rows"),
        (nested(lambda meta: [row.pop() for row in meta["input_top_logprobs"][1:]]), "5 positions with 2 each"),
        (set_entry(2, 0, [float("nan"), 1, None]), "not finite"),
        (set_entry(2, 0, [None, 1, None]), "no rows|not finite"),
        (set_entry(2, 0, [-0.05, 1, None]), "probability of 1.0"),
        (set_entry(2, 0, [-2.0, 3, None]), "twice"),
        (set_entry(2, 0, [-2.0, 200, None]), "vocabulary of 200"),
        (set_entry(2, 0, [-2.0, -1, None]), "vocabulary of 200"),
        (set_entry(2, 0, [-4.0, TOKENS[3], None]), "differ by 2.4"),  # the sampled token, elsewhere at -1.6
        (other_dtype, "'float16', not float32"),
        (torn, "cannot be read"),
    ],
)
def test_rows_that_do_not_fit_are_refused(fault: Any, detail: str) -> None:
    error = score(FakeSGLang(fault), "teacher")
    assert isinstance(error, TeacherScoreError)
    assert error.reason == "top"
    assert error.args[0].startswith("top: ")
    assert re.search(detail, str(error))


def test_log_probs_of_other_ids_than_were_asked_about_are_refused() -> None:
    def swap(answer: dict[str, Any]) -> None:
        answer["meta_info"]["input_token_ids_logprobs"][2][0][1] += 1

    assert "other ids" in str(score(FakeSGLang(swap), "student"))
