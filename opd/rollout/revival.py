"""Starts a dead server of ours again, with the weights of the moment, a limited number of times."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from opd.errors import EngineError, UserError
from opd.rollout.current_weights import CurrentWeights
from opd.rollout.engine_server import EngineServer

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.25


async def nothing(server: EngineServer) -> None:
    """For an engine that has nobody to tell."""


class Reviver:
    """Belongs to the event loop.

    Args:
        max_restarts: per server and run.
        start_timeout_s: for one start.
        on_down, on_up: awaited when a server is found dead, and when it is ready again.
    """

    def __init__(
        self,
        weights: CurrentWeights,
        *,
        max_restarts: int,
        start_timeout_s: float,
        on_down: Callable[[EngineServer], Awaitable[None]] = nothing,
        on_up: Callable[[EngineServer], Awaitable[None]] = nothing,
    ) -> None:
        self._weights = weights
        self._max_restarts = max_restarts
        self._start_timeout_s = start_timeout_s
        self.on_down = on_down
        self.on_up = on_up
        self._tasks: dict[EngineServer, asyncio.Task[None]] = {}

    def revive(self, server: EngineServer) -> asyncio.Task[None]:
        """The task that starts a dead server again: one for all who notice, and a failed one is not repeated."""
        task = self._tasks.get(server)
        if task is None or (task.done() and task.exception() is None):
            server.ready = False
            task = self._tasks[server] = asyncio.create_task(self._revive(server))
        return task

    async def all_ready(self, servers: Iterable[EngineServer]) -> None:
        """Waits until every server is; starts those that are dead.

        Raises:
            EngineError, WeightSyncError: one cannot be brought back.
        """
        for server in servers:
            while server.dead() or not server.ready:
                # The others who wait for it, and the server itself, outlive a caller who gives up.
                await asyncio.shield(self.revive(server))

    async def watch(self, servers: Iterable[EngineServer]) -> None:
        """Until it is cancelled: starts each server that is found dead.

        Raises:
            EngineError, WeightSyncError: one cannot be brought back.
        """
        while True:
            for server in servers:
                if server.dead():
                    self.revive(server)
                task = self._tasks.get(server)
                if task is not None and task.done():
                    task.result()
            await asyncio.sleep(WATCH_SECONDS)

    async def _revive(self, server: EngineServer) -> None:
        while True:
            if server.restarts >= self._max_restarts:
                raise EngineError(self._last_word(server))
            server.restarts += 1
            logger.warning(
                "the SGLang server at %s has ended; restart %d of %d", server.url, server.restarts, self._max_restarts
            )
            server.version = None
            server.released = False
            await self.on_down(server)
            await asyncio.to_thread(server.server.restart)
            try:
                seconds = await asyncio.to_thread(server.server.wait_ready, self._start_timeout_s)
                await self._weights.give(server)
                await self.on_up(server)
            except UserError as error:
                server.ready = False
                if not server.dead():
                    raise
                logger.warning("the SGLang server at %s could not be started again: %s", server.url, error)
                continue
            logger.info("the SGLang server at %s is back after %.1f s", server.url, seconds)
            return

    def _last_word(self, server: EngineServer) -> str:
        said = server.describe("is not there")
        if not self._max_restarts:
            return said
        return f"{said}\nIt was started again {server.restarts} times: --sglang-max-restarts={self._max_restarts}"
