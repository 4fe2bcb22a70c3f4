"""One SGLang server as the rollout engine sees it: its address, whether it may be asked, and whose weights it holds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd.background_loop import BackgroundLoop
from opd.errors import EngineError, WeightSyncError
from opd.rollout.answer_batches import AnswerBatcher
from opd.serving import memory_occupation
from opd.serving.http import HttpError, JsonClient
from opd.serving.server import SGLangServer

logger = logging.getLogger(__name__)

DEATH_NOTICE_SECONDS = 5.0  # a connection breaks before the process is seen to have ended; SGLang's watchdog needs 1 s
DEATH_POLL_SECONDS = 0.05


@dataclass(eq=False)
class EngineServer:
    """
    Attributes:
        server: None for one that somebody else runs.
        ready: requests may be sent; False from its death until a restarted one holds the current weights.
        version: the weights it was given last; None: those it started with.
        restarts: in this run.
        in_flight: requests of ours, where this process chooses their server.
        busy_seconds: with at least one of them in flight, since they were last taken.
        released: its GPU memory is given away, and its weights with it.
        answers: asks for them, those together that start together.
    """

    url: str
    server: SGLangServer | None
    client: JsonClient
    ready: bool = True
    version: int | None = None
    restarts: int = 0
    in_flight: int = 0
    busy_seconds: float = 0.0
    released: bool = False
    answers: AnswerBatcher = field(init=False)
    _busy_since: float = 0.0

    def __post_init__(self) -> None:
        self.answers = AnswerBatcher(self.client)

    def begin_request(self) -> None:
        if self.in_flight == 0:
            self._busy_since = time.monotonic()
        self.in_flight += 1

    def end_request(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self.busy_seconds += time.monotonic() - self._busy_since

    def take_busy_seconds(self) -> float:
        taken, self.busy_seconds = self.busy_seconds, 0.0
        return taken

    def dead(self) -> bool:
        return self.server is not None and not self.server.alive()

    def describe(self, what: str) -> str:
        if self.server is None:
            return f"the SGLang server at {self.url} {what}"
        tail = f"The end of its log ({self.server.log_path}):\n{self.server.log_tail()}"
        return f"the SGLang server at {self.url} {'has ended' if self.dead() else what}. {tail}"

    async def died_of(self, error: BaseException) -> bool:
        """Whether ``error`` is a lost connection to a server of ours that has ended."""
        cause = error if isinstance(error, HttpError) else error.__cause__
        if self.server is None or not isinstance(cause, HttpError):
            return self.dead()
        # A server that dies may still answer 500 to what it had accepted.
        broken = cause.reason == "unreachable" or (cause.status or 0) >= 500
        patience = DEATH_NOTICE_SECONDS if broken else 0.0
        for _ in range(round(patience / DEATH_POLL_SECONDS)):
            if self.dead():
                return True
            await asyncio.sleep(DEATH_POLL_SECONDS)
        return self.dead()

    async def ask_logprobs(self, tokens: list[int]) -> Any:
        """SGLang's answer with the log-probs of ``tokens`` at temperature 1.

        Raises:
            HttpError: there is none.
        """
        payload = {
            "input_ids": tokens,
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        return await self.client.post("/generate", payload, give_up=self.dead)

    async def take_back(self, tags: tuple[str, ...]) -> None:
        """The memory that it has given away; nothing for a server that has not.

        Raises:
            EngineError: it refused.
        """
        if self.released:
            await memory_occupation.take_back(self.client, tags, give_up=self.dead)

    async def held_version(self) -> str:
        """What the server itself says about its weights.

        Raises:
            WeightSyncError: it does not answer.
        """
        try:
            return str((await self.client.get("/model_info")).get("weight_version"))
        except HttpError as error:
            raise WeightSyncError(self.describe(f"does not say which weights it holds ({error})")) from error


class Receivers:
    """The servers that take part in one weight update. One of ours that dies leaves, and the others go on.

    Not for the thread of ``loop``: its methods wait.
    """

    def __init__(self, loop: BackgroundLoop, servers: Sequence[EngineServer]) -> None:
        self._loop = loop
        self.live = list(servers)

    def each(self, start: Callable[[EngineServer], Coroutine[Any, Any, None]]) -> None:
        """Runs one coroutine per server, all at once.

        Raises:
            WeightSyncError: a server that lives refused.
        """
        self._loop.run(self._each(start))

    def drop(self, server: EngineServer) -> None:
        logger.warning("the SGLang server at %s ended during a weight update", server.url)
        self.live.remove(server)

    async def _each(self, start: Callable[[EngineServer], Coroutine[Any, Any, None]]) -> None:
        servers = list(self.live)
        results = await asyncio.gather(*(start(server) for server in servers), return_exceptions=True)
        for server, result in zip(servers, results, strict=True):
            if not isinstance(result, BaseException):
                continue
            if isinstance(result, WeightSyncError | EngineError) and await server.died_of(result):
                self.drop(server)
            else:
                raise result
