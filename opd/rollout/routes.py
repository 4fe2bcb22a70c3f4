"""Which server a request goes to, and what happens to it when that server dies: it is sent again."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from opd.errors import EngineError
from opd.rollout.engine_server import EngineServer
from opd.rollout.revival import Reviver
from opd.serving.http import HttpError, JsonClient
from opd.serving.router import SGLangRouter

logger = logging.getLogger(__name__)

LED_PROMPT_TOKENS = 64  # below, computing a prompt for all of its answers costs less than a request of its own
RETRY_SECONDS = 0.25  # the first pause; each later one is twice as long


@dataclass(eq=False)
class PromptGroup:
    """The requests of one prompt.

    Args:
        size: how many they are.

    Attributes:
        home: the server that holds the prompt's prefix.
        led: one of them went ahead; set once it has computed the prompt, or ended.
    """

    size: int = 1
    home: EngineServer | None = None
    led: asyncio.Event | None = None


class Route(Protocol):
    async def post(self, group: PromptGroup, payload: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The answer to a ``/generate`` request, and the address that gave it.

        Raises:
            HttpError: reason "timeout".
            EngineError: it was refused, or the server that has it cannot be reached although it lives.
        """

    async def changed(self, server: EngineServer) -> None:
        """A server has become ready: who waits for one may go on."""


class LeastLoaded:
    """Straight to a server: a prompt's answers to one, each new prompt to the one with the fewest requests.

    A prompt waits while every server has ``limit`` requests, so a faster server gets more prompts. When a server dies
    its prompts move to the others; without others they wait for it.
    """

    def __init__(self, servers: Sequence[EngineServer], reviver: Reviver, *, limit: int, retries: int) -> None:
        self._servers = servers
        self._reviver = reviver
        self._limit = limit
        self._retries = retries
        self._change = asyncio.Condition()
        reviver.on_up = self.changed

    async def post(self, group: PromptGroup, payload: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """See ``Route.post``."""
        attempt = 0
        while True:
            server = await self._take_place(group)
            life = server.restarts
            try:
                answer = await self._ask(server, group, payload)
                if server.restarts == life:  # else it may be from before the restarted server had its weights
                    return answer, server.url
            except HttpError as error:
                if server.restarts != life or not server.ready or await server.died_of(error):
                    if server.dead():
                        self._reviver.revive(server)
                    continue
                if error.reason == "timeout":
                    raise
                if not error.retryable or attempt >= self._retries:
                    raise EngineError(server.describe(f"could not be used ({error})")) from error
                await pause_before_retry(attempt)
                attempt += 1
            finally:
                server.end_request()
                await self._notify(1)

    async def changed(self, server: EngineServer) -> None:
        """See ``Route.changed``."""
        await self._notify(None)

    async def _ask(self, server: EngineServer, group: PromptGroup, payload: dict[str, Any]) -> dict[str, Any]:
        """A long prompt's first request goes ahead: sent together, all would compute the prompt."""
        if group.led is None and group.size > 1 and len(payload["input_ids"]) >= LED_PROMPT_TOKENS:
            group.led = asyncio.Event()
            try:
                return await server.answers.post(payload, begun=group.led.set)
            finally:
                group.led.set()
        if group.led is not None:
            await group.led.wait()
        return await server.answers.post(payload)

    async def _take_place(self, group: PromptGroup) -> EngineServer:
        async with self._change:
            while True:
                server = self._place(group)
                if server is not None:
                    group.home = server
                    server.begin_request()
                    return server
                await self._change.wait()

    def _place(self, group: PromptGroup) -> EngineServer | None:
        if group.home is not None and group.home.ready:
            return group.home
        ready = [server for server in self._servers if server.ready]
        best = min(ready, key=lambda server: server.in_flight, default=None)
        return best if best is not None and best.in_flight < self._limit else None

    async def _notify(self, count: int | None) -> None:
        async with self._change:
            if count is None:
                self._change.notify_all()
            else:
                self._change.notify(count)


class ThroughRouter:
    """Everything to ``sglang-router``, which chooses the server; a dead one is taken off its list until it is back.

    The router is started again when it dies.

    Args:
        start_timeout_s: for the router, and for its finding a server healthy.
    """

    def __init__(
        self,
        router: SGLangRouter,
        client: JsonClient,
        servers: Sequence[EngineServer],
        reviver: Reviver,
        *,
        max_restarts: int,
        start_timeout_s: float,
        retries: int,
    ) -> None:
        self._router = router
        self._client = client
        self._servers = servers
        self._max_restarts = max_restarts
        self._start_timeout_s = start_timeout_s
        self._retries = retries
        self._restarts = 0
        self._turn = asyncio.Lock()
        self._change = asyncio.Condition()
        reviver.on_down = self._down
        reviver.on_up = self.changed

    async def post(self, group: PromptGroup, payload: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """See ``Route.post``."""
        attempt = 0
        while True:
            await self._usable()
            life = self._restarts
            try:
                return await self._client.post_once("/generate", payload), self._router.url
            except HttpError as error:
                if error.reason == "timeout":
                    raise
                await pause_before_retry(min(attempt, self._retries))
                gone = self._restarts != life or not self._router.alive()
                if gone or any(server.dead() or not server.ready for server in self._servers):
                    continue
                if not error.retryable or attempt >= self._retries:
                    raise EngineError(self._router.describe(f"could not be used ({error})")) from error
                attempt += 1

    async def changed(self, server: EngineServer) -> None:
        """See ``Route.changed``; the router hears of it first."""
        async with self._turn:
            if self._router.alive():
                await asyncio.to_thread(self._router.add, server.url, self._start_timeout_s)
        async with self._change:
            self._change.notify_all()

    async def _down(self, server: EngineServer) -> None:
        async with self._turn:
            if self._router.alive():
                await asyncio.to_thread(self._router.remove, server.url)

    async def _usable(self) -> None:
        """Waits for a server, and starts a dead router again."""
        async with self._change:
            await self._change.wait_for(lambda: any(server.ready for server in self._servers))
        async with self._turn:
            if self._router.alive():
                return
            if self._restarts >= self._max_restarts:
                raise EngineError(self._router.describe("is not there"))
            self._restarts += 1
            logger.warning("%s", self._router.describe("is not there"))
            ready = [server.url for server in self._servers if server.ready]
            await asyncio.to_thread(self._router.restart)
            await asyncio.to_thread(self._router.wait_ready, ready, self._start_timeout_s)
            for server in self._servers:  # it starts with the servers of the beginning
                if not server.ready:
                    await asyncio.to_thread(self._router.remove, server.url)


async def pause_before_retry(attempt: int) -> None:
    await asyncio.sleep(RETRY_SECONDS * 2**attempt * random.uniform(0.5, 1.0))
