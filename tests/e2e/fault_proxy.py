"""Stands between a run and a real teacher server, and spoils what passes through, step by step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from aiohttp import web

from opd.background_loop import BackgroundLoop

UNAVAILABLE_SECONDS = 20.0
TRUNCATED_REQUESTS = 3
EVERY_NTH_ROW = 4


def nan(entries: list[Any]) -> None:
    entries[-1][0] = float("nan")


def minus_infinity(entries: list[Any]) -> None:
    entries[-2][0] = float("-inf")


def one_too_few(entries: list[Any]) -> None:
    entries.pop(1)


def wrong_id(entries: list[Any]) -> None:
    entries[-1][1] += 1


class FaultProxy:
    """
    Args:
        target: address of the real server.
        steps_done: of the run; a request belongs to the step after these.
        faults: by step: "unavailable" (503 for 20 s), "truncated" (the first answers break off), or what is done to
            the log-prob entries of every 4th row.
    """

    def __init__(self, target: str, steps_done: Callable[[], int], faults: dict[int, Any]) -> None:
        self.seen: dict[int, int] = {}  # requests by step
        self.rows: dict[int, int] = {}
        self._target = target
        self._steps_done = steps_done
        self._faults = faults
        self._unavailable_until: float | None = None
        self._loop = BackgroundLoop("fault proxy")

    @contextmanager
    def running(self) -> Iterator[int]:
        """Gives the port."""
        runner = self._loop.run(self._start())
        try:
            yield runner.addresses[0][1]
        finally:
            self._loop.run(runner.cleanup())
            self._loop.close()

    async def _start(self) -> web.AppRunner:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self._pass)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    async def _pass(self, request: web.Request) -> web.Response:
        step = self._steps_done() + 1
        fault = self._faults.get(step)
        if fault == "unavailable":
            self._unavailable_until = self._unavailable_until or time.monotonic() + UNAVAILABLE_SECONDS
            if time.monotonic() < self._unavailable_until:
                self.seen[step] = self.seen.get(step, 0) + 1
                return web.Response(status=503, text="busy")
        async with aiohttp.ClientSession() as session:
            body = await request.read()
            headers = {"Content-Type": "application/json"}
            async with session.request(request.method, self._target + request.path, data=body, headers=headers) as done:
                text, status = await done.text(), done.status
        if request.path != "/generate" or fault in (None, "unavailable"):
            return web.Response(text=text, status=status, content_type="application/json")
        self.seen[step] = self.seen.get(step, 0) + 1
        if fault == "truncated":
            spoiled = text[:-20] if self.seen[step] <= TRUNCATED_REQUESTS else text
        else:
            spoiled = self._spoil(text, step, fault)
        return web.Response(text=spoiled, status=status, content_type="application/json")

    def _spoil(self, text: str, step: int, fault: Callable[[list[Any]], None]) -> str:
        answer = json.loads(text)
        for row in answer if isinstance(answer, list) else [answer]:
            self.rows[step] = self.rows.get(step, 0) + 1
            if self.rows[step] % EVERY_NTH_ROW == 0:
                fault(row["meta_info"]["input_token_logprobs"])
        return json.dumps(answer)
