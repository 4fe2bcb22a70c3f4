"""Which weights the servers of an engine have to hold: all of them the same, whoever dies in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from opd.background_loop import BackgroundLoop
from opd.errors import EngineError, TeacherError, WeightSyncError
from opd.rollout.engine_server import EngineServer, Receivers
from opd.rollout.weight_sync import NamedTensors, WeightSync
from opd.serving import memory_occupation, weight_push
from opd.serving.http import HttpError
from opd.teachers.sglang_teacher import response_logprobs


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A text that tells whether a server holds the trainer's weights.

    Args:
        expected: the trainer's log-probs of the last tokens, at temperature 1, in nats.
        tolerance: mean absolute difference, in nats per token.
    """

    tokens: list[int]
    expected: list[float]
    tolerance: float

    async def check(self, server: EngineServer) -> float:
        """The mean absolute difference, in nats per token.

        Raises:
            WeightSyncError: it is above the tolerance, or the server's answer is no score of the text.
            HttpError: there was no answer.
        """
        answer = await server.ask_logprobs(self.tokens)
        try:
            actual = response_logprobs(answer, self.tokens, len(self.expected))
        except TeacherError as error:
            raise WeightSyncError(f"the SGLang server at {server.url} cannot be checked: {error}") from error
        expected_T = torch.tensor(self.expected, dtype=torch.float64)
        difference = float((torch.tensor(actual, dtype=torch.float64) - expected_T).abs().mean())
        if not difference <= self.tolerance:
            raise WeightSyncError(
                f"after the weight sync the log-probs of the SGLang server at {server.url} are off by "
                f"{difference:.3g} nats per token, more than --max-logprob-mismatch={self.tolerance}: it does not hold "
                "the trainer's weights"
            )
        return difference


class CurrentWeights:
    """
    Attributes:
        version: of the last update; None: there was none, the servers hold what they started with.
        probe: of that version, once one is known; a restarted server has to pass it.
    """

    def __init__(self, loop: BackgroundLoop, sync: WeightSync) -> None:
        self.version: int | None = None
        self.probe: Probe | None = None
        self._loop = loop
        self._sync = sync
        self._turn = asyncio.Lock()  # an update, or the weights of one restarted server

    def update(self, servers: Sequence[EngineServer], named_tensors: NamedTensors, version: int) -> None:
        """Gives the weights to all servers that are ready. One that dies meanwhile is left out, not reported.

        Requests in flight are paused and go on with the new weights. Not for the event loop's thread.

        Raises:
            WeightSyncError: a server that lives refused.
        """
        self._loop.run(self._turn.acquire())
        try:
            self.probe = None
            receivers = Receivers(self._loop, [server for server in servers if server.ready])
            self._paused(receivers, lambda: self._push(receivers, named_tensors, version))
            self.version = version
            for server in receivers.live:
                server.version = version
        finally:
            self._loop.run(self._end_turn())

    def release_memory(self, servers: Sequence[EngineServer]) -> None:
        """The servers, which must be idle, give their GPU memory away and stay paused until the next ``update``.

        Not for the event loop's thread.

        Raises:
            EngineError, WeightSyncError: a server that lives refused.
        """
        self._loop.run(self._turn.acquire())
        try:
            receivers = Receivers(self._loop, [server for server in servers if server.ready])
            receivers.each(lambda server: weight_push.pause(server.client, give_up=server.dead))
            receivers.each(lambda server: memory_occupation.release(server.client, give_up=server.dead))
            for server in receivers.live:
                server.released = True
        finally:
            self._loop.run(self._end_turn())

    async def give(self, server: EngineServer) -> None:
        """Gives the current weights to a server that has just been started, and makes it ready.

        Raises:
            EngineError: it died again, or there are no whole weights to give.
            WeightSyncError: it refused them, or does not pass the probe.
        """
        async with self._turn:
            if self.version is not None and server.version != self.version:
                receivers = Receivers(self._loop, [server])
                try:
                    await asyncio.to_thread(self._sync.repeat, receivers, self.version)
                    if receivers.live and self.probe is not None:
                        await self.probe.check(server)
                except (HttpError, ValueError) as error:
                    raise EngineError(server.describe(f"could not be given its weights again ({error})")) from error
                if not receivers.live:
                    raise EngineError(server.describe("ended while it was given its weights"))
                server.version = self.version
            server.ready = True

    def close(self) -> None:
        self._sync.close()

    def _push(self, receivers: Receivers, named_tensors: NamedTensors, version: int) -> None:
        receivers.each(lambda server: server.take_back(memory_occupation.WEIGHTS))
        self._sync.push(receivers, named_tensors, version)
        receivers.each(lambda server: server.take_back(memory_occupation.BESIDE_WEIGHTS))
        for server in receivers.live:
            server.released = False

    def _paused(self, receivers: Receivers, push: Callable[[], None]) -> None:
        receivers.each(lambda server: weight_push.pause(server.client, give_up=server.dead))
        try:
            push()
        finally:
            receivers.each(lambda server: weight_push.resume(server.client, give_up=server.dead))

    async def _end_turn(self) -> None:
        self._turn.release()
