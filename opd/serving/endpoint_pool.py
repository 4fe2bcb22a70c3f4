"""One teacher behind several addresses: requests go to the endpoint that answers soonest, and survive the others.

A request that fails is sent to another endpoint; when no endpoint works, it waits until one does again. One that takes
much longer than others of its kind is sent to a second endpoint as well, and the first good answer wins. ``endpoint``
has the rules for who is asked, ``turns`` the queue, ``breaker`` when an endpoint is left alone.
"""

from __future__ import annotations

import asyncio
import logging
import random as random_module
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from opd.serving.addresses import Address
from opd.serving.breaker import Backoff, CircuitBreaker
from opd.serving.endpoint import Endpoint, PostOnce, choose_hedge
from opd.serving.http import HttpError, JsonClient, base_url
from opd.serving.lateness import Lateness
from opd.serving.pool_stats import PoolStats
from opd.serving.turns import Job, OutOfTime, Turns

logger = logging.getLogger(__name__)

HEALTH_PATH = "/health"
HEALTH_TIMEOUT_SECONDS = 10.0  # SGLang generates a token for it and looks once a second whether it came

# Statuses of a server that is not up to answering now, whatever the request: its retries are not limited in number.
UNAVAILABLE_STATUSES = frozenset({408, 425, 429, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """
    Args:
        timeout_s: for one attempt.
        retries: further attempts after failures of endpoints that work. Waiting for an endpoint that does not work
            is limited by ``deadline_s`` alone.
        concurrency: requests in flight at each endpoint.
        deadline_s: for one job, all attempts and the waiting for an endpoint that works included.
        hedge_factor: another endpoint is asked too after this many times the median latency; 0: never.
        retry_backoff: pauses before a request is sent again to an endpoint that failed it.
        breaker_backoff: pauses before an endpoint that failed repeatedly is checked.
    """

    timeout_s: float = 60.0
    retries: int = 3
    concurrency: int = 64
    api_key: str | None = None
    ca_file: str | None = None
    deadline_s: float = 300.0
    hedge_factor: float = 3.0
    retry_backoff: Backoff = Backoff(first_s=0.25, longest_s=10.0)
    breaker_backoff: Backoff = Backoff(first_s=0.25, longest_s=5.0)


@dataclass(frozen=True, kw_only=True)
class Answer:
    value: Any  # decoded JSON
    endpoint: Endpoint  # whose it is


@dataclass(frozen=True, kw_only=True)
class _Request:
    path: str
    payload: dict[str, Any]
    kind: Hashable  # requests of a kind take about as long as each other


class EndpointPool:
    """Belongs to the event loop that first uses it, as ``JsonClient`` does.

    Args:
        through: makes the function that sends a request to an endpoint from its client's, as one that joins several.
        clock: seconds, rising; breakers and the choice of an endpoint go by it.
        random: draws from [0, 1), for the lengths of pauses.
    """

    def __init__(
        self,
        addresses: list[Address],
        settings: PoolSettings | None = None,
        *,
        through: Callable[[PostOnce], PostOnce] = lambda post: post,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self.settings = settings = settings or PoolSettings()
        self._clock = clock
        self._random = random
        self.endpoints = [self._endpoint(address, through) for address in addresses]
        self._turns = Turns(self.endpoints, clock)
        self._lateness = Lateness(settings.hedge_factor if len(addresses) > 1 else 0)
        self._checks: set[asyncio.Task[None]] = set()
        self._last_error: HttpError | None = None

    @property
    def base_url(self) -> str:
        return ", ".join(endpoint.client.base_url for endpoint in self.endpoints)

    @property
    def stats(self) -> PoolStats:
        return PoolStats(self.endpoints, self._turns)

    def job(self, prefix: Hashable | None = None) -> Job:
        """The time and the prompt that the requests for one sample share; its time starts to run with them."""
        return Job(prefix=prefix, left_s=self.settings.deadline_s)

    async def get(self, path: str) -> Any:
        """From the first endpoint that works; one that does not answer is not waited for."""
        first = next((e for e in self.endpoints if e.breaker.closed), self.endpoints[0])
        return await first.client.get(path)

    async def post(self, path: str, payload: dict[str, Any], *, kind: Hashable = None, job: Job | None = None) -> Any:
        """The decoded JSON answer; see ``ask``."""
        return (await self.ask(path, payload, kind=kind, job=job)).value

    async def ask(
        self,
        path: str,
        payload: dict[str, Any],
        *,
        kind: Hashable = None,
        job: Job | None = None,
        avoid: Endpoint | None = None,
    ) -> Answer:
        """
        Args:
            kind: requests to ``path`` of a kind take about as long as each other; a late one is known by it.
            job: whose time it spends; one of its own without it.
            avoid: asked only when no other endpoint works.

        Raises:
            HttpError: the request is wrong, it failed ``retries`` times more than once, or its time is over.
        """
        job = job or self.job()
        request = _Request(path=path, payload=payload, kind=(path, kind))
        shunned: set[Endpoint] = set() if avoid is None else {avoid}
        failures = attempts = 0
        last: HttpError | None = None
        while True:
            try:
                endpoint = await self._turns.take(job, shunned)
            except OutOfTime:
                raise self._given_up(self._out_of_time(last or self._last_error), self.endpoints[0]) from last
            endpoint.client.stats.retries += attempts > 0
            attempts += 1
            try:
                return await self._race(endpoint, request, job)
            except HttpError as error:
                cut_short = job.left_s <= 0
                if not cut_short or last is None:
                    last = self._last_error = error
                failures += error.status not in UNAVAILABLE_STATUSES and error.reason != "unreachable"
                if error.retryable and cut_short:
                    raise self._given_up(self._out_of_time(last), endpoint) from error
                if not error.retryable or failures > self.settings.retries:
                    raise self._given_up(error, endpoint) from error.__cause__
            asked_again = endpoint in shunned or len(self.endpoints) == 1
            if asked_again and endpoint.breaker.closed:  # a breaker that opened makes its own pause
                await self._pause(attempts - 1, job)
            shunned = shunned | {endpoint}

    async def until(self, event: asyncio.Future[None], job: Job) -> None:
        """Waits for another job's ``event``. Raises HttpError when no endpoint worked for all of this job's time."""
        try:
            await self._turns.wait(event, job)
        except OutOfTime:
            raise self._out_of_time(self._last_error) from None

    def others(self, endpoint: Endpoint) -> bool:
        """Whether another endpoint works."""
        return any(e is not endpoint and e.breaker.closed for e in self.endpoints)

    def blame(self, endpoint: Endpoint) -> None:
        """For an answer that another endpoint gave right: it counts like no answer."""
        endpoint.client.stats.errors += 1
        self._failed(endpoint)

    async def close(self) -> None:
        for check in self._checks:
            check.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        for endpoint in self.endpoints:
            await endpoint.client.close()

    def _endpoint(self, address: Address, through: Callable[[PostOnce], PostOnce]) -> Endpoint:
        given = self.settings
        client = JsonClient(
            base_url(address.url), given.timeout_s, given.retries, given.concurrency, given.api_key, given.ca_file
        )
        return Endpoint(
            client=client,
            post=through(client.post_once),
            breaker=CircuitBreaker(backoff=given.breaker_backoff, clock=self._clock, random=self._random),
            weight=address.weight,
            concurrency=given.concurrency,
        )

    async def _race(self, first: Endpoint, request: _Request, job: Job) -> Answer:
        """Asks ``first``, and when it takes long another one. The slots that they take are given back."""
        started = self._clock()
        left_s = job.left_s
        running = {self._start(first, request): first}
        failure: HttpError | None = None
        try:
            while running:
                elapsed = self._clock() - started
                if elapsed >= left_s:
                    for late in running.values():
                        self._failed(late)
                    raise HttpError("timeout", f"no answer within the {left_s:.3g} s left", retryable=True)
                timeout = min(left_s - elapsed, self._lateness.wait(request.kind, elapsed))
                done, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    endpoint = running.pop(task)
                    error = task.exception()
                    if error is None:
                        endpoint.client.stats.hedge_wins += endpoint is not first
                        now = self._clock()
                        for late in running.values():
                            late.overtaken(self._lateness.multiple(request.kind, now - started), now)
                        return Answer(value=task.result(), endpoint=endpoint)
                    if not isinstance(error, HttpError) or not error.retryable:
                        raise error
                    failure = error
                if not done:
                    self._hedge(running, request, self._clock() - started)
            raise failure
        finally:
            job.left_s -= self._clock() - started
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _start(self, endpoint: Endpoint, request: _Request) -> asyncio.Task[Any]:
        task = asyncio.create_task(self._attempt(endpoint, request))
        task.add_done_callback(lambda _: self._turns.give_back(endpoint))  # also when it is cancelled before it began
        return task

    async def _attempt(self, endpoint: Endpoint, request: _Request) -> Any:
        started = self._clock()
        try:
            answer = await endpoint.post(request.path, request.payload)
        except HttpError as error:
            if error.retryable:
                self._failed(endpoint)
            elif error.status is not None:
                self._worked(endpoint)  # it answers, and says that the request is wrong
            raise
        self._worked(endpoint)
        now = self._clock()
        self._lateness.add(request.kind, now - started)
        endpoint.answered(self._lateness.multiple(request.kind, now - started), now)
        return answer

    def _hedge(self, running: dict[asyncio.Task[Any], Endpoint], request: _Request, elapsed: float) -> None:
        """Asks one more endpoint when the request is late by now and one can be asked."""
        if len(running) > 1 or not self._lateness.late(request.kind, elapsed):
            return
        second = choose_hedge(self.endpoints, now=self._clock(), asked=running.values())
        if second is not None:
            second.in_flight += 1
            second.client.stats.hedges += 1
            running[self._start(second, request)] = second

    def _worked(self, endpoint: Endpoint) -> None:
        if not endpoint.breaker.closed:
            logger.info("%s answers again", endpoint.client.base_url)
        endpoint.breaker.succeeded()
        self._turns.serve()

    def _failed(self, endpoint: Endpoint) -> None:
        if not endpoint.breaker.failed():
            return
        endpoint.client.stats.breaker_openings += 1
        logger.info("%s is left alone for now: it failed repeatedly", endpoint.client.base_url)
        self._turns.serve()
        check = asyncio.create_task(self._check(endpoint))
        self._checks.add(check)
        check.add_done_callback(self._checks.discard)

    async def _check(self, endpoint: Endpoint) -> None:
        """Until a health check passes; then one request may try."""
        while True:
            await asyncio.sleep(max(0.0, endpoint.breaker.retry_at - self._clock()))
            healthy = await endpoint.client.answers(HEALTH_PATH, timeout_s=HEALTH_TIMEOUT_SECONDS)
            if endpoint.breaker.closed:  # a request that was still in flight has been answered
                return
            if healthy:
                endpoint.breaker.passed()
                self._turns.serve()
                return
            endpoint.breaker.pause()

    async def _pause(self, n: int, job: Job) -> None:
        seconds = min(self.settings.retry_backoff.pause(n, self._random), max(job.left_s, 0.0))
        job.left_s -= seconds
        await asyncio.sleep(seconds)

    def _given_up(self, error: HttpError, endpoint: Endpoint) -> HttpError:
        endpoint.client.stats.failures += 1
        return error

    def _out_of_time(self, last: HttpError | None) -> HttpError:
        limit = f"no answer within {self.settings.deadline_s:g} s in all"
        if last is None:
            return HttpError("timeout", f"{limit} from {self.base_url}", retryable=True)
        detail = str(last).removeprefix(f"{last.reason}: ")
        return HttpError(last.reason, f"{limit}; the last failure: {detail}", retryable=True, status=last.status)
