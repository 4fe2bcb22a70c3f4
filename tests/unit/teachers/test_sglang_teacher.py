"""Faults of a teacher server: which are retried, which end a sample's score, and with what reason."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from opd.serving.addresses import addresses
from opd.serving.breaker import Backoff
from opd.serving.endpoint_pool import EndpointPool
from opd.teachers.score_batches import BatchLimits
from opd.teachers.sglang_teacher import SGLangTeacher, TeacherScoreError, response_logprobs
from tests.unit.serving.fake_sglang import FakeSGLang, good_answer, logprob_of

pytestmark = pytest.mark.unit

TOKENS = [11, 12, 13, 14, 15, 16, 17]
RESPONSE_LENGTH = 4
EXPECTED = [logprob_of(i, TOKENS[i]) for i in range(3, 7)]


def quick(teacher: SGLangTeacher) -> SGLangTeacher:
    """The same with short pauses."""
    settings = replace(
        teacher.http.settings,
        retry_backoff=Backoff(first_s=0.001, longest_s=0.01),
        breaker_backoff=Backoff(first_s=0.01, longest_s=0.05),
    )
    urls = ",".join(endpoint.client.base_url for endpoint in teacher.http.endpoints)
    teacher.http = EndpointPool(addresses(urls), settings)
    return teacher


def _score(fake: FakeSGLang, **settings: Any) -> tuple[Any, Any]:
    """(score or the error, counters)."""

    async def run() -> tuple[Any, Any]:
        async with fake.running():
            teacher = quick(SGLangTeacher(fake.url + "/generate", **{"timeout_s": 0.2, **settings}))
            try:
                result: Any = await teacher.score(TOKENS, RESPONSE_LENGTH)
            except TeacherScoreError as error:
                result = error
            await teacher.close()
            return result, teacher.stats.take()

    return asyncio.run(run())


def test_the_request_starts_one_token_before_the_response() -> None:
    fake = FakeSGLang()
    scores, stats = _score(fake)
    assert scores == EXPECTED
    assert fake.requests[0]["logprob_start_len"] == 2
    assert fake.requests[0]["sampling_params"]["max_new_tokens"] == 0
    assert (stats.requests, stats.retries, stats.failures) == (1, 0, 0)
    assert stats.bytes > 100
    assert stats.seconds > 0


@pytest.mark.parametrize(
    "faults", [(503, 503), (429,), ("truncated",), ("closed",), ("hang",), (500, "truncated", 502)]
)
def test_a_passing_fault_is_retried(faults: tuple[Any, ...]) -> None:
    scores, stats = _score(FakeSGLang(*faults))
    assert scores == EXPECTED
    assert stats.retries >= len(faults)
    assert stats.failures == 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(500, "http_status"), ("truncated", "bad_json"), ("hang", "timeout")],
)
def test_a_lasting_fault_is_given_up_with_its_reason(fault: Any, reason: str) -> None:
    fake = FakeSGLang(*[fault] * 20)
    error, stats = _score(fake, retries=2)
    assert error.reason == reason
    assert reason in str(error)
    assert len(fake.requests) >= 3
    assert (stats.retries, stats.failures) == (2, 1)


@pytest.mark.parametrize(("fault", "reason"), [(503, "http_status"), ("closed", "unreachable")])
def test_a_server_that_is_down_is_asked_until_the_deadline_however_few_the_retries(fault: Any, reason: str) -> None:
    fake = FakeSGLang(*[fault] * 50)
    error, stats = _score(fake, retries=0, deadline_s=0.5)
    assert error.reason == reason
    assert "no answer within 0.5 s in all" in str(error)
    assert 4 <= len(fake.requests) < 50
    assert fake.health_checks >= 2 and stats.breaker_openings >= 2
    assert stats.failures == 1
    scores, stats = _score(FakeSGLang(*[fault] * 9), retries=0)
    assert scores == EXPECTED
    assert (stats.requests, stats.failures) == (10, 0)


def _entries(answer: dict[str, Any]) -> list[Any]:
    return answer["meta_info"]["input_token_logprobs"]


def _nan(answer: dict[str, Any]) -> None:
    _entries(answer)[2][0] = float("nan")


def _null(answer: dict[str, Any]) -> None:
    _entries(answer)[1][0] = None


def _minus_infinity(answer: dict[str, Any]) -> None:
    _entries(answer)[-1][0] = float("-inf")


def _lowest_of_its_type(answer: dict[str, Any]) -> None:
    _entries(answer)[-1][0] = -3.4028234663852886e38


def _above_one(answer: dict[str, Any]) -> None:
    _entries(answer)[-1][0] = 0.7


def _one_too_few(answer: dict[str, Any]) -> None:
    _entries(answer).pop()


def _other_ids(answer: dict[str, Any]) -> None:
    _entries(answer)[3][1] += 1


def _shifted(answer: dict[str, Any]) -> None:
    _entries(answer).insert(0, [None, 99, None])


def _no_entries(answer: dict[str, Any]) -> dict[str, Any]:
    return {"meta_info": {}}


def _a_list(answer: dict[str, Any]) -> Any:
    return [answer]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (400, "http_status"),
        (404, "http_status"),
        (_nan, "not_finite"),
        (_null, "not_finite"),
        (_minus_infinity, "not_finite"),
        (_lowest_of_its_type, "not_finite"),
        (_above_one, "positive"),
        (_one_too_few, "length"),
        (_other_ids, "ids"),
        (_shifted, "ids"),
        (_no_entries, "shape"),
        (_a_list, "shape"),
    ],
)
def test_a_wrong_answer_is_not_asked_for_again(fault: Any, reason: str) -> None:
    fake = FakeSGLang(fault)
    error, _ = _score(fake)
    assert isinstance(error, TeacherScoreError)
    assert error.reason == reason
    assert len(fake.requests) == 1


def test_a_wrong_answer_is_asked_for_once_more_at_another_address() -> None:
    async def run(first: Any, second: Any) -> tuple[Any, list[int], list[int]]:
        fakes = FakeSGLang(first), FakeSGLang(second)
        async with AsyncExitStack() as stack:
            for fake in fakes:
                await stack.enter_async_context(fake.running())
            teacher = SGLangTeacher(",".join(fake.url for fake in fakes))
            try:
                result: Any = await teacher.score(TOKENS, RESPONSE_LENGTH)
            except TeacherScoreError as error:
                result = error.reason
            _, each = teacher.stats.take_each()
            await teacher.close()
            return result, [len(fake.requests) for fake in fakes], [stats.errors for stats in each]

    assert asyncio.run(run(_nan, None)) == (EXPECTED, [1, 1], [1, 0])
    assert asyncio.run(run(_one_too_few, None)) == (EXPECTED, [1, 1], [1, 0])
    # Both say so: it is the sample, and no address is to blame.
    assert asyncio.run(run(_nan, _other_ids)) == ("ids", [1, 1], [0, 0])


def test_a_dead_port() -> None:
    async def run() -> None:
        teacher = SGLangTeacher("http://127.0.0.1:9", retries=1, deadline_s=0.3)
        with pytest.raises(TeacherScoreError, match=r"unreachable: .*http://127.0.0.1:9/generate") as caught:
            await teacher.score(TOKENS, 2)
        assert caught.value.reason == "unreachable"
        await teacher.close()

    asyncio.run(run())


def test_an_empty_response_asks_nothing_and_an_empty_prompt_cannot_be_scored() -> None:
    async def run() -> None:
        teacher = SGLangTeacher("http://127.0.0.1:9", retries=0)
        assert await teacher.score(TOKENS, 0) == []
        with pytest.raises(TeacherScoreError, match="prompt"):
            await teacher.score(TOKENS, len(TOKENS))
        assert teacher.stats.take().requests == 0

    asyncio.run(run())


def test_raw_answers_with_any_start_are_trimmed_to_the_response() -> None:
    for start in (0, 1, 2):
        answer = good_answer({"input_ids": TOKENS, "logprob_start_len": start})
        assert response_logprobs(answer, TOKENS, RESPONSE_LENGTH) == EXPECTED
        assert response_logprobs(answer, TOKENS, 0) == []


def test_the_last_id_of_the_vocabulary_is_echoed_as_zero_and_still_scored() -> None:
    answer = good_answer({"input_ids": TOKENS, "logprob_start_len": 2})
    for entry in _entries(answer)[3:4]:
        entry[1] = 0
    assert response_logprobs(answer, TOKENS, RESPONSE_LENGTH) == EXPECTED
    _entries(answer)[4][1] = 0  # two different ids cannot both be the last one
    with pytest.raises(TeacherScoreError, match="ids"):
        response_logprobs(answer, TOKENS, RESPONSE_LENGTH)


def test_requests_in_flight_are_bounded() -> None:
    fake = FakeSGLang()

    async def run() -> None:
        async with fake.running():
            teacher = SGLangTeacher(fake.url, concurrency=3, lead_prompts=False, batches=BatchLimits(rows=1))
            await asyncio.gather(*(teacher.score(TOKENS, 2) for _ in range(20)))
            await teacher.close()

    asyncio.run(run())
    assert len(fake.requests) == 20
    assert fake.most_in_flight == 3


@pytest.mark.parametrize("first_fault", [None, 400])
def test_the_first_of_a_prompt_goes_ahead_even_when_it_fails(first_fault: int | None) -> None:
    fake = FakeSGLang(first_fault)

    async def run() -> list[Any]:
        async with fake.running():
            teacher = SGLangTeacher(fake.url, batches=BatchLimits(rows=1))
            groups = [[prompt, prompt, answer] for prompt in (1, 2) for answer in range(10, 14)]
            results = await asyncio.gather(*(teacher.score(t, 1) for t in groups), return_exceptions=True)
            await teacher.close()
            return results

    results = asyncio.run(run())
    leaders = [request["input_ids"][0] for request in fake.requests[:2]]
    assert sorted(leaders) == [1, 2]
    failures = [r for r in results if isinstance(r, Exception)]
    assert len(failures) == (first_fault is not None)


def test_the_session_closes_with_its_loop(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> Any:
        async with FakeSGLang().running() as fake:
            teacher = SGLangTeacher(fake.url)
            await teacher.score(TOKENS, 2)
            return teacher.http.endpoints[0].client._session

    assert asyncio.run(run()).closed
    assert "Unclosed" not in caplog.text
