"""Answers asked for in one request: each comes when it is finished, fails alone, and none is left waiting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from opd.rollout.answer_batches import NEVER, AnswerBatcher
from opd.serving.http import HttpError, JsonClient

pytestmark = pytest.mark.unit

Send = Callable[[Any], Awaitable[None]]
GONE = object()


def payload(token: int, **fields: Any) -> dict[str, Any]:
    return {"input_ids": [token], "sampling_params": {"max_new_tokens": token}, "return_logprob": True, **fields}


def finished(index: int, reason: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "output_ids": [index], "meta_info": {"finish_reason": reason or {"type": "stop"}}}


def unfinished(index: int) -> dict[str, Any]:
    return {"index": index, "output_ids": [], "meta_info": {"finish_reason": None}}


class Server:
    """
    Args:
        script: the events of a list request, as ``send`` takes them; ``send(GONE)`` breaks the connection.
    """

    def __init__(self, script: Callable[[Send, int], Awaitable[None]]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.cut_off = asyncio.Event()
        self._script = script

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if "stream" not in body:
            return web.json_response(finished(body["input_ids"][0]))
        response = web.StreamResponse()
        await response.prepare(request)

        async def send(event: Any) -> None:
            if event is GONE:
                request.transport.close()
                return
            text = b"data: " + json.dumps(event).encode() + b"\n\n"
            await response.write(text[:9])  # events need not come in pieces of their own
            await response.write(text[9:])

        try:
            await self._script(send, len(body["input_ids"]))
            await response.write(b"data: [DONE]\n\n")
        except asyncio.CancelledError:
            self.cut_off.set()
            raise
        return response

    @asynccontextmanager
    async def asked(self, **options: Any) -> AsyncIterator[AnswerBatcher]:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = JsonClient(f"http://127.0.0.1:{runner.addresses[0][1]}", timeout_s=5.0)
        try:
            yield AnswerBatcher(client, **options)
        finally:
            await client.close()
            await runner.cleanup()


async def in_order(send: Send, count: int) -> None:
    for index in range(count):
        await send(unfinished(index))
        await send(finished(index))


def outcomes(script: Callable[[Send, int], Awaitable[None]], count: int) -> list[Any]:
    """Of that many rows asked for together: each one's answer or error."""

    async def ask() -> list[Any]:
        async with Server(script).asked() as batcher:
            rows = (batcher.post(payload(token)) for token in range(count))
            return await asyncio.gather(*rows, return_exceptions=True)

    return asyncio.run(ask())


def test_an_answer_comes_before_its_slower_neighbours() -> None:
    go_on = asyncio.Event()

    async def last_first(send: Send, count: int) -> None:
        await send(finished(2))
        await go_on.wait()
        await send(finished(0))
        await send(finished(1))

    async def ask() -> None:
        server = Server(last_first)
        async with server.asked() as batcher:
            rows = [asyncio.create_task(batcher.post(payload(token))) for token in (7, 8, 9)]
            assert (await rows[2])["output_ids"] == [2]
            assert not rows[0].done() and not rows[1].done()
            go_on.set()
            assert [(await row)["output_ids"] for row in rows] == [[0], [1], [2]]
        (body,) = server.bodies
        assert body["input_ids"] == [[7], [8], [9]]
        wanted = [{"max_new_tokens": token, "stream_interval": NEVER} for token in (7, 8, 9)]
        assert (body["sampling_params"], body["return_logprob"]) == (wanted, True)

    asyncio.run(ask())


def test_what_may_share_a_request() -> None:
    """At most ``rows``; the same fields but prompt and sampling; nothing that SGLang does not stream."""

    async def ask() -> list[Any]:
        server = Server(in_order)
        async with server.asked(rows=2) as batcher:
            packed = {"top_logprobs_num": 2, "return_flat_raw_output_top_logprobs": True}
            rows = [payload(t) for t in range(5)] + [payload(t, top_logprobs_num=3) for t in (5, 6)]
            rows += [payload(t, **packed) for t in (7, 8)]
            await asyncio.gather(*map(batcher.post, rows))
        return sorted(body["input_ids"] for body in server.bodies if "stream" in body), len(server.bodies)

    assert asyncio.run(ask()) == ([[[0], [1]], [[2], [3]], [[5], [6]]], 3 + 3)


def test_a_broken_connection_costs_the_unfinished_only() -> None:
    async def breaks(send: Send, count: int) -> None:
        await send(finished(1))
        await send(unfinished(0))
        await send(GONE)

    first, second, third = outcomes(breaks, 3)
    assert second["output_ids"] == [1]
    assert [(type(e), e.reason, e.retryable) for e in (first, third)] == [(HttpError, "unreachable", True)] * 2


@pytest.mark.parametrize(("code", "retryable"), [(503, True), (400, False)])
def test_a_row_that_the_server_gives_up_fails_alone(code: int, retryable: bool) -> None:
    async def gives_up(send: Send, count: int) -> None:
        await send(finished(0, {"type": "abort", "status_code": code, "message": "full"}))
        await send(finished(1, {"type": "abort", "message": "Abort before prefill"}))
        await send(finished(2))

    refused, aborted, good = outcomes(gives_up, 3)
    assert isinstance(refused, HttpError) and (refused.status, refused.retryable) == (code, retryable)
    assert aborted["meta_info"]["finish_reason"]["type"] == "abort"
    assert good["output_ids"] == [2]


@pytest.mark.parametrize(
    ("event", "reason", "words"),
    [
        ({"error": {"code": 400, "message": "too long"}}, "http_status", "400: too long"),
        ({"index": 9, "meta_info": {"finish_reason": None}}, "bad_json", "no answer to a row"),
        (["nothing"], "bad_json", "no answer to a row"),
        (None, "bad_json", "left out a row"),
    ],
)
def test_a_request_that_fails_as_a_whole_leaves_no_row_waiting(event: Any, reason: str, words: str) -> None:
    async def fails(send: Send, count: int) -> None:
        await send(finished(0))
        if event is not None:
            await send(event)

    good, bad = outcomes(fails, 2)
    assert good["output_ids"] == [0]
    assert isinstance(bad, HttpError) and bad.reason == reason and words in str(bad)


def test_a_request_ends_when_nobody_wants_its_rows() -> None:
    async def never(send: Send, count: int) -> None:
        await send(finished(0))
        await asyncio.Event().wait()

    async def ask() -> None:
        server = Server(never)
        async with server.asked() as batcher:
            rows = [asyncio.create_task(batcher.post(payload(token))) for token in range(3)]
            await rows[0]
            rows[1].cancel()
            await asyncio.sleep(0.05)
            assert not server.cut_off.is_set()  # the third is still wanted
            rows[2].cancel()
            await asyncio.wait_for(server.cut_off.wait(), 5)

    asyncio.run(ask())


def test_who_asks_is_told_when_the_prompt_is_computed() -> None:
    """By the first token, also of a row that goes alone; at once where nothing is streamed."""
    go_on = asyncio.Event()

    async def slow(send: Send, count: int) -> None:
        await send(unfinished(0))
        await go_on.wait()
        await send(finished(0))

    async def ask() -> None:
        server = Server(slow)
        async with server.asked() as batcher:
            begun = asyncio.Event()
            row = asyncio.create_task(batcher.post(payload(4), begun=begun.set))
            await asyncio.wait_for(begun.wait(), 5)
            assert not row.done()
            go_on.set()
            assert (await row)["output_ids"] == [0]
            unstreamed = asyncio.Event()
            packed = payload(4, return_flat_raw_output_top_logprobs=True)
            row = asyncio.create_task(batcher.post(packed, begun=unstreamed.set))
            await asyncio.sleep(0)
            assert unstreamed.is_set() and not row.done()
            await row

    asyncio.run(ask())


def test_long_prompts_fill_a_request_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.rollout.answer_batches.TOKENS", 10)

    async def ask() -> list[int]:
        server = Server(in_order)
        async with server.asked() as batcher:
            rows = [payload(3) | {"input_ids": [1] * length} for length in (4, 6, 1, 20, 9)]
            await asyncio.gather(*map(batcher.post, rows))
        lists = [body["input_ids"] for body in server.bodies]
        return sorted([len(row) for row in rows] if isinstance(rows[0], list) else [len(rows)] for rows in lists)

    assert asyncio.run(ask()) == [[1], [4, 6], [9], [20]]
