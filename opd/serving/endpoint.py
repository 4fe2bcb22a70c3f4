"""One server of several that answer alike: its client, its circuit breaker, and how busy and how slow it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from opd.serving.breaker import BreakerState, CircuitBreaker
from opd.serving.http import JsonClient

PostOnce = Callable[[str, dict[str, Any]], Awaitable[Any]]  # path, payload -> decoded answer, or HttpError; no retries

SMOOTHING = 0.3  # share of the newest answer in the moving average
MEMORY_SECONDS = 60.0  # an average without a newer answer is forgotten: the endpoint gets another chance
SLOW = 2.0  # times the fastest endpoint's latency: below, differences are load's and noise's

STAY_LOADS = 2.0  # a prompt's samples leave the endpoint with its prefix when it is this many times as busy as the
STAY_REQUESTS = 6  # best one, and this many requests: a group of 8 answers to an otherwise idle prompt stays together


@dataclass(kw_only=True, eq=False)
class Endpoint:
    """
    Args:
        post: sends one request.
        weight: share of the load, relative to the other endpoints.
        concurrency: requests in flight at most.
    """

    client: JsonClient
    post: PostOnce
    breaker: CircuitBreaker
    weight: float = 1.0
    concurrency: int = 64
    in_flight: int = 0
    _latency: float | None = field(default=None, repr=False)  # moving average, as a multiple of its kind's median
    _latency_at: float = field(default=0.0, repr=False)

    @property
    def full(self) -> bool:
        return self.in_flight >= self.concurrency

    @property
    def free(self) -> bool:
        """Whether it may be asked now: one request at a time while its breaker is half-open."""
        if self.breaker.state is BreakerState.HALF_OPEN:
            return self.in_flight == 0
        return self.breaker.closed and not self.full

    def latency(self, now: float) -> float | None:
        """Moving average of its answers' times, each as a multiple of the median of its kind; None: not known."""
        return None if now - self._latency_at > MEMORY_SECONDS else self._latency

    def answered(self, multiple: float, now: float) -> None:
        """``multiple``: the time that an answer took over the median of its kind."""
        average = self.latency(now)
        self._latency = multiple if average is None else average + SMOOTHING * (multiple - average)
        self._latency_at = now

    def overtaken(self, multiple: float, now: float) -> None:
        """Another endpoint answered first, after this one had taken at least ``multiple``."""
        if multiple > (self.latency(now) or 0.0):
            self.answered(multiple, now)


def slowness(endpoint: Endpoint, endpoints: Iterable[Endpoint], now: float) -> float:
    """Its latency over the fastest endpoint's; 1 unless it is much slower."""
    own = endpoint.latency(now)
    known = [latency for e in endpoints if (latency := e.latency(now)) is not None]
    if own is None or min(known) <= 0 or own < SLOW * min(known):
        return 1.0
    return own / min(known)


def load(endpoint: Endpoint, endpoints: Iterable[Endpoint], now: float) -> float:
    """About how long one more request would take there: requests by weight, times how slow it is."""
    return (endpoint.in_flight + 1) / endpoint.weight * slowness(endpoint, endpoints, now)


def choose(
    endpoints: list[Endpoint],
    *,
    now: float,
    home: Endpoint | None = None,
    shunned: Iterable[Endpoint] = (),
) -> Endpoint | None:
    """Who gets a request; None: it has to wait.

    The least loaded of those that may be asked, the first of equals. ``home`` (which has the prompt's prefix in its
    cache) keeps it unless it is clearly busier. ``shunned`` endpoints failed this request: they are asked again only
    when none of the others works.
    """
    allowed = [e for e in endpoints if e not in shunned]
    if not any(e.breaker.closed or e.free for e in allowed):
        allowed = endpoints
    free = [e for e in allowed if e.free]
    if not free:
        return None
    loads = {id(e): load(e, endpoints, now) for e in free}
    best = min(free, key=lambda e: loads[id(e)])
    if home in free and loads[id(home)] <= STAY_LOADS * loads[id(best)] + STAY_REQUESTS:
        return home
    return best


def choose_hedge(endpoints: list[Endpoint], *, now: float, asked: Iterable[Endpoint]) -> Endpoint | None:
    """Who is asked besides the ``asked``: healthy, not full, and not slow itself; None: nobody."""
    able = [
        e
        for e in endpoints
        if e not in asked and e.breaker.closed and not e.full and slowness(e, endpoints, now) < SLOW
    ]
    return min(able, key=lambda e: load(e, endpoints, now)) if able else None
