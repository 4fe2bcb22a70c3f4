"""What goes together, what does not wait, and that a row never pays for its neighbours."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from opd.serving.http import HttpError, JsonClient
from opd.teachers.score_batches import BatchLimits, ScoreBatcher
from tests.unit.serving.fake_sglang import FakeSGLang, good_answer, rows_of

pytestmark = pytest.mark.unit


def payload(*ids: int, start: int = 0, **fields: Any) -> dict[str, Any]:
    return {"input_ids": list(ids), "logprob_start_len": start, "return_logprob": True, **fields}


class Server:
    """Answers when told to, and remembers how many rows came in each request."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.cancelled = 0
        self._answers: list[asyncio.Event] = []

    async def post(self, path: str, request: dict[str, Any]) -> Any:
        assert path == "/generate"
        self.sizes.append(len(rows_of(request)))
        self._answers.append(asyncio.Event())
        try:
            await self._answers[-1].wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return good_answer(request)

    async def answer(self, *requests: int) -> None:
        for number in requests:
            self._answers[number].set()
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def start(batcher: ScoreBatcher, *payloads: dict[str, Any]) -> list[asyncio.Task[Any]]:
    return [asyncio.ensure_future(batcher.post("/generate", p)) for p in payloads]


def test_a_row_goes_at_once_and_what_comes_meanwhile_goes_together() -> None:
    async def run() -> None:
        server = Server()
        batcher = ScoreBatcher(server.post, BatchLimits(in_flight=1))
        first = start(batcher, payload(1, 2))
        await settle()
        assert server.sizes == [1]
        rest = start(batcher, payload(3, 4, 5, start=1), payload(6, 7))
        await settle()
        rest += start(batcher, payload(8, 9))
        await settle()
        assert server.sizes == [1]
        await server.answer(0)
        assert first[0].result() == good_answer(payload(1, 2))
        assert server.sizes == [1, 3]
        await server.answer(1)
        assert [task.result() for task in rest] == [
            good_answer(p) for p in (payload(3, 4, 5, start=1), payload(6, 7), payload(8, 9))
        ]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("limits", "payloads", "sizes"),
    [
        ({"rows": 2}, [payload(1, 2)] * 5, [2, 2, 1]),
        ({"rows": 1}, [payload(1, 2)] * 3, [1, 1, 1]),
        ({"tokens": 5}, [payload(1, 2), payload(1, 2, 3, 4, 5, 6), payload(3, 4), payload(5, 6)], [2, 1, 1]),
        ({}, [payload(1, 2), payload(3, 4, top_logprobs_num=2), payload(5, 6)], [2, 1]),
        (
            {},
            [payload(1, 2), payload(3, 4, token_ids_logprob=[5]), payload(6, 7, token_ids_logprob=[8, 9])],
            [1, 2],
        ),
    ],
    ids=["rows", "no batches", "tokens", "other fields", "ids to look up"],
)
def test_what_may_share_a_request(limits: dict[str, int], payloads: list[dict[str, Any]], sizes: list[int]) -> None:
    async def run() -> None:
        server = Server()
        tasks = start(ScoreBatcher(server.post, BatchLimits(**limits, in_flight=9)), *payloads)
        await settle()
        assert server.sizes == sizes
        await server.answer(*range(len(sizes)))
        assert [task.result() for task in tasks] == [good_answer(p) for p in payloads]

    asyncio.run(run())


def test_other_requests_are_passed_on() -> None:
    async def run() -> None:
        sent: list[tuple[str, dict[str, Any]]] = []

        async def post(path: str, request: dict[str, Any]) -> str:
            sent.append((path, request))
            return "as it came"

        batcher = ScoreBatcher(post)
        others = [("/model_info", {}), ("/generate", {"input_ids": [1], "sampling_params": {}})]
        assert await asyncio.gather(*(batcher.post(*other) for other in others)) == ["as it came"] * 2
        assert sent == others

    asyncio.run(run())


def test_a_row_nobody_waits_for_is_not_sent_and_a_request_nobody_waits_for_is_ended() -> None:
    async def run() -> None:
        server = Server()
        batcher = ScoreBatcher(server.post, BatchLimits(in_flight=1))
        sent = start(batcher, payload(1, 2), payload(3, 4))
        await settle()
        waiting = start(batcher, payload(5, 6), payload(7, 8))
        sent[0].cancel()
        waiting[0].cancel()
        await settle()
        assert (server.sizes, server.cancelled) == ([2], 0)
        sent[1].cancel()
        await settle()
        assert (server.sizes, server.cancelled) == ([2, 1], 1)
        await server.answer(1)
        assert waiting[1].result() == good_answer(payload(7, 8))

    asyncio.run(run())


def over_http(fake: FakeSGLang, ask: Callable[[ScoreBatcher], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with fake.running():
            client = JsonClient(fake.url, timeout_s=0.2)
            try:
                return await ask(ScoreBatcher(client.post_once))
            finally:
                await client.close()

    return asyncio.run(run())


def no_list(answer: Any) -> Any:
    return answer[0]


def one_too_few(answer: Any) -> Any:
    return answer[:-1]


@pytest.mark.parametrize("fault", [500, "truncated", "closed", no_list, one_too_few])
def test_after_a_failed_batch_every_row_is_asked_for_alone(fault: Any) -> None:
    fake, payloads = FakeSGLang(fault), [payload(1, 2), payload(3, 4), payload(5, 6)]
    answers = over_http(fake, lambda batcher: asyncio.gather(*(batcher.post("/generate", p) for p in payloads)))
    assert answers == [good_answer(p) for p in payloads]
    assert [len(rows_of(request)) for request in fake.requests] == [3, 1, 1, 1]


def test_after_a_timeout_rows_go_alone_until_one_is_answered() -> None:
    fake, p = FakeSGLang("hang"), payload(1, 2)

    async def ask(batcher: ScoreBatcher) -> list[Any]:
        late = await asyncio.gather(*start(batcher, p, p), return_exceptions=True)
        assert [getattr(error, "reason", error) for error in late] == ["timeout"] * 2
        alone = await asyncio.gather(*start(batcher, p, p))
        return [*alone, *await asyncio.gather(*start(batcher, p, p))]

    assert over_http(fake, ask) == [good_answer(p)] * 4
    assert [len(rows_of(request)) for request in fake.requests] == [2, 1, 1, 2]


def test_a_bad_row_fails_by_itself() -> None:
    fake, payloads = FakeSGLang(context_length=3), [payload(1, 2), payload(3, 4, 5, 6), payload(7, 8)]
    answers = over_http(
        fake, lambda batcher: asyncio.gather(*(batcher.post("/generate", p) for p in payloads), return_exceptions=True)
    )
    assert [answers[0], answers[2]] == [good_answer(payloads[0]), good_answer(payloads[2])]
    assert isinstance(answers[1], HttpError)
    assert answers[1].status == 400


def test_an_error_that_is_no_servers_reaches_every_row() -> None:
    async def run() -> list[Any]:
        async def post(path: str, request: dict[str, Any]) -> Any:
            raise ZeroDivisionError

        return await asyncio.gather(*start(ScoreBatcher(post), payload(1), payload(2)), return_exceptions=True)

    assert [type(error) for error in asyncio.run(run())] == [ZeroDivisionError] * 2
