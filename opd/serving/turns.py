"""Who asks which endpoint when: a queue in front of several endpoints, and the time that a job may spend."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from opd.serving.endpoint import Endpoint, choose

# Prompts whose endpoint is known. It only bounds memory: forgetting one costs one prefill.
REMEMBERED_PREFIXES = 4096


class OutOfTime(Exception):
    """A job's time is over."""


@dataclass(kw_only=True, eq=False)
class Job:
    """What the requests for one sample share.

    Args:
        prefix: names the prompt they begin with; they go where it is cached already.
        left_s: seconds that they may take in all. Waiting for a turn costs nothing while an endpoint works: a long
            queue is no fault.
    """

    prefix: Hashable | None
    left_s: float


@dataclass(kw_only=True, eq=False)
class _Waiting:
    job: Job
    shunned: Iterable[Endpoint]
    turn: asyncio.Future[Endpoint]


class Turns:
    """First come, first served, by whichever endpoint is free and fits best.

    Args:
        clock: seconds, rising.
    """

    def __init__(self, endpoints: list[Endpoint], clock: Callable[[], float]) -> None:
        self.queue_max = 0  # most that waited at one time, since somebody set it to 0
        self._endpoints = endpoints
        self._clock = clock
        self._queue: deque[_Waiting] = deque()
        self._homes: OrderedDict[Hashable, Endpoint] = OrderedDict()
        self._down_seconds = 0.0
        self._down_since: float | None = None

    async def take(self, job: Job, shunned: Iterable[Endpoint] = ()) -> Endpoint:
        """An endpoint with one of its slots, which ``give_back`` frees.

        Raises:
            OutOfTime: no endpoint worked for as long as the job had time.
        """
        turn = asyncio.get_running_loop().create_future()
        waiting = _Waiting(job=job, shunned=shunned, turn=turn)
        self._queue.append(waiting)
        self.serve()
        self.queue_max = max(self.queue_max, len(self._queue))
        try:
            await self.wait(turn, job)
        except BaseException:
            if turn.done():
                self.give_back(turn.result())
            else:
                self._queue.remove(waiting)
            raise
        return turn.result()

    def give_back(self, endpoint: Endpoint) -> None:
        endpoint.in_flight -= 1
        self.serve()

    def serve(self) -> None:
        """Hands out what is free. Called when a slot is freed or a breaker has changed."""
        self._note_whether_down()
        passed_over: list[_Waiting] = []  # they wait for an endpoint that has not failed them
        while self._queue and any(e.free for e in self._endpoints):
            first = self._queue.popleft()
            endpoint = self._choose(first)
            if endpoint is None:
                passed_over.append(first)
                continue
            endpoint.in_flight += 1
            first.turn.set_result(endpoint)
        self._queue.extendleft(reversed(passed_over))

    async def wait(self, awaited: asyncio.Future[object], job: Job) -> None:
        """Until the future is done. Costs the job time while no endpoint works.

        Raises:
            OutOfTime: that was all the time it had.
        """
        started = self.down_seconds()
        try:
            while not awaited.done():
                left = job.left_s - (self.down_seconds() - started)
                if left <= 0:
                    raise OutOfTime
                await asyncio.wait({awaited}, timeout=left)
        finally:
            job.left_s -= self.down_seconds() - started

    def down_seconds(self) -> float:
        """Time so far in which no endpoint worked."""
        if self._down_since is None:
            return self._down_seconds
        return self._down_seconds + self._clock() - self._down_since

    def _choose(self, waiting: _Waiting) -> Endpoint | None:
        prefix = waiting.job.prefix
        home = None if prefix is None else self._homes.get(prefix)
        endpoint = choose(self._endpoints, now=self._clock(), home=home, shunned=waiting.shunned)
        if endpoint is not None and prefix is not None and endpoint is not home:
            self._homes[prefix] = endpoint
            if len(self._homes) > REMEMBERED_PREFIXES:
                self._homes.popitem(last=False)
        return endpoint

    def _note_whether_down(self) -> None:
        down = not any(e.breaker.closed for e in self._endpoints)
        if down and self._down_since is None:
            self._down_since = self._clock()
        elif not down and self._down_since is not None:
            self._down_seconds = self.down_seconds()
            self._down_since = None
