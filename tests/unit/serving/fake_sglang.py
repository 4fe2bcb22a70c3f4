"""A server that answers SGLang's requests with whatever faults a test asks for."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from aiohttp import web

HANG_SECONDS = 0.5  # longer than the time-out of the tests' clients


def logprob_of(position: int, token: int) -> float:
    return -0.5 - 0.001 * position - 0.01 * token


def top_of(position: int, count: int) -> list[list[Any]]:
    """[log-prob, id, text] of the tokens that the fake finds likeliest at a position: small odd ids."""
    return [[-2.0 - 0.1 * k - 0.001 * position, 2 * k + 1, None] for k in range(count)]


def rows_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The single requests of one, which may hold lists."""
    if not isinstance(request["input_ids"][0], list):
        return [request]
    lists = ("input_ids", "logprob_start_len", "token_ids_logprob")
    rows = zip(*(request[key] for key in lists if key in request), strict=True)
    return [request | dict(zip([key for key in lists if key in request], row, strict=True)) for row in rows]


def good_answer(request: dict[str, Any], *, packed: bool = True) -> Any:
    """As SGLang: entries from ``logprob_start_len`` on, the first one without a log-prob.

    ``packed``: whether the server knows the packed form of top log-probs. A request with lists gets a list.
    """
    if isinstance(request["input_ids"][0], list):
        return [good_answer(row, packed=packed) for row in rows_of(request)]
    ids, start = request["input_ids"], request["logprob_start_len"]
    entries = [[None if i == start else logprob_of(i, ids[i]), ids[i], None] for i in range(start, len(ids))]
    meta: dict[str, Any] = {"input_token_logprobs": entries, "finish_reason": {"type": "length"}}
    count, asked = request.get("top_logprobs_num", 0), request.get("token_ids_logprob")
    rows = [top_of(i, count) for i in range(start + 1, len(ids))]
    if count and packed and request.get("return_flat_raw_top_logprobs_b64"):
        meta |= packed_rows("input", rows)
    elif count:
        meta["input_top_logprobs"] = [None, *rows]
    if asked:
        chosen = [[[-3.0 - logprob_of(i, t) / 100, t, None] for t in asked] for i in range(start + 1, len(ids))]
        meta["input_token_ids_logprobs"] = [None, *chosen]
    return {"text": "", "meta_info": meta}


def packed_rows(side: str, rows: list[list[list[Any]]]) -> dict[str, Any]:
    result: dict[str, Any] = {
        f"{side}_top_logprobs_shape": [len(rows), len(rows[0])],
        f"{side}_top_logprobs_null_prefix": 1,
    }
    for name, place, dtype in (("val", 0, "float32"), ("idx", 1, "int32")):
        array = np.array([[entry[place] for entry in row] for row in rows], dtype=dtype)
        result[f"{side}_top_logprobs_{name}_flat_b64"] = base64.b64encode(array.tobytes()).decode()
        result[f"{side}_top_logprobs_{name}_flat_b64_dtype"] = dtype
    return result


class FakeSGLang:
    """``faults`` are used up one per ``/generate`` request; then, and without any, every answer is good.

    A fault is an HTTP status, "truncated", "closed", "hang", or a function that changes the good answer.

    Args:
        context_length: a request with a longer row is refused whole, as by SGLang; that uses up no fault.
    """

    def __init__(self, *faults: Any, context_length: int | None = None) -> None:
        self.faults = list(faults)
        self.context_length = context_length
        self.requests: list[dict[str, Any]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.delay_s = 0.005
        self.healthy = True
        self.health_checks = 0
        self.url = ""

    async def health(self, request: web.Request) -> web.Response:
        self.health_checks += 1
        return web.Response(status=200 if self.healthy else 503)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(request, body)
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(self.delay_s)
        if self.context_length and any(len(row["input_ids"]) > self.context_length for row in rows_of(body)):
            return web.json_response({"error": {"message": "longer than the model's context length"}}, status=400)
        fault = self.faults.pop(0) if self.faults else None
        answer = good_answer(body)
        if fault is None:
            return web.json_response(answer)
        if callable(fault):
            return web.Response(text=json.dumps(fault(answer) or answer), content_type="application/json")
        if fault == "truncated":
            return web.Response(text=json.dumps(answer)[:-10], content_type="application/json")
        if fault == "hang":
            await asyncio.sleep(HANG_SECONDS)
        if fault == "closed":
            request.transport.close()
        return web.Response(status=fault if isinstance(fault, int) else 200, text="fault")

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[FakeSGLang]:
        """Listens on ``port``, a free one without it. Leaving cuts off what is in flight, as a kill does."""
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/health", self.health)
        runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()
