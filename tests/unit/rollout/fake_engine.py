"""Stands in for a ``SGLangServer`` process: writes answers, takes weights, dies when a test wants it to.

Its model is one number ``w``: every token has log-prob -w, and its id is the server's own number.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import pickle
import threading
from pathlib import Path
from typing import Any

from aiohttp import web

from opd.background_loop import BackgroundLoop
from opd.errors import EngineError
from opd.serving.command import ServerOptions
from opd.serving.process import free_port

FIRST_W = 0.5


class FakeEngineServer:
    """
    Args:
        token_seconds: for one token.
        start_seconds: for one start.
        die_on: path of the request on which it dies, once.
        broken_restart: weights that arrive after a restart are not the ones that were sent.
    """

    def __init__(
        self,
        number: int = 1,
        *,
        token_seconds: float = 0.002,
        start_seconds: float = 0.0,
        die_on: str = "",
        broken_restart: bool = False,
    ) -> None:
        self.number, self.token_seconds, self.start_seconds = number, token_seconds, start_seconds
        self.die_on, self.broken_restart = die_on, broken_restart
        self.options = ServerOptions(model_path="fake")
        self.log_path = Path(f"fake_{number}.log")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.asked: list[tuple[str, Any]] = []  # a list of n prompts stands there n times
        self.lists: list[tuple[int, int]] = []  # length of each, and how many answers were written when it came
        self.written = 0
        self.lives = 0
        self._alive = False
        self._starting = 0.0
        self._stopped = threading.Event()
        self._loop = BackgroundLoop(f"fake {number}")
        self._begin_life()
        self._loop.run(self._listen())

    def alive(self) -> bool:
        return self._alive

    def kill(self) -> None:
        self._alive = False

    def restart(self) -> None:
        self._begin_life()
        if self._stopped.wait(self.start_seconds):
            raise EngineError("stopped")

    def wait_ready(self, timeout_s: float) -> float:
        if not self._alive:
            raise EngineError("ended while starting")
        return self.start_seconds

    def log_tail(self) -> str:
        return "the last line"

    def stop(self) -> None:
        self._stopped.set()
        self._alive = False
        self._loop.close()

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)

    def _begin_life(self) -> None:
        self.lives += 1
        self.w, self.version, self.paused = FIRST_W, "default", False
        self._alive = True

    async def _listen(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        quiet = logging.getLogger("fake engine")
        quiet.disabled = True  # the router tries gRPC first, which aiohttp would report
        runner = web.AppRunner(app, shutdown_timeout=0, logger=quiet)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {}
        if request.path == self.die_on:
            self.die_on = ""
            self.kill()
        life = self.lives
        if body.get("stream"):
            return await self._stream(request, _rows(body))
        self.asked.append((request.path, body))
        answer = await self._act(request.path, body) if self._alive else None
        if not self._alive or self.lives != life:
            request.transport.close()
            return web.Response(status=500)
        return web.json_response(answer)

    async def _act(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/generate":
            return await self._write(body)
        if path == "/model_info":
            return {"weight_version": self.version}
        if path in ("/pause_generation", "/continue_generation"):
            self.paused = path.startswith("/pause")
            return {"status": "ok"}
        if path == "/update_weights_from_tensor":
            tensors = dict(pickle.loads(base64.b64decode(body["serialized_named_tensors"][0])))
            self.w = float(tensors["w"]) + (1.0 if self.broken_restart and self.lives > 1 else 0.0)
            self.version = body.get("weight_version", self.version)
        return {"success": True}

    async def _stream(self, request: web.Request, rows: list[dict[str, Any]]) -> web.StreamResponse:
        """Each row's first token, and each whole answer as it is finished, as server-sent events."""
        self.asked += [(request.path, row) for row in rows]
        self.lists.append((len(rows), self.written))
        life = self.lives
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def row(index: int, body: dict[str, Any]) -> None:
            await send({"index": index, "output_ids": [self.number], "meta_info": {"finish_reason": None}})
            await send({"index": index, **await self._write(body)})

        async def send(event: dict[str, Any]) -> None:
            if self._alive and self.lives == life:
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            else:
                request.transport.close()

        await asyncio.gather(*(row(index, body) for index, body in enumerate(rows)))
        if request.transport is not None:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def _write(self, body: dict[str, Any]) -> Any:
        count = body["sampling_params"]["max_new_tokens"]
        if count == 0:  # scoring
            ids = body["input_ids"]
            entries = [[None if i == 0 else -self.w, token, None] for i, token in enumerate(ids)]
            return {"meta_info": {"input_token_logprobs": entries, "weight_version": self.version}}
        life, entries, versions = self.lives, [], []
        while len(entries) < count and self._alive and self.lives == life:
            await asyncio.sleep(self.token_seconds)
            if not self.paused:
                entries.append([-self.w, self.number, None])
                versions.append(self.version)
        self.written += 1
        starts = [i for i, version in enumerate(versions) if i == 0 or version != versions[i - 1]]
        return {
            "output_ids": [self.number] * len(entries),
            "meta_info": {
                "finish_reason": {"type": "length"},
                "output_token_logprobs": entries,
                "weight_version": self.version,
                "weight_versions": [{"start": i, "end": 0, "version": versions[i]} for i in starts],
            },
        }


def _rows(body: dict[str, Any]) -> list[dict[str, Any]]:
    lists = zip(body["input_ids"], body["sampling_params"], strict=True)
    return [body | {"input_ids": ids, "sampling_params": params} for ids, params in lists]
