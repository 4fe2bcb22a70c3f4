"""A circuit breaker: after several failures in a row a server is left alone, and tried again after growing pauses.

    closed --(N failures in a row)--> open --(pause over, health check passed)--> half-open --(an answer)--> closed
                                       ^                                              |
                                       +-------------------(a failure)----------------+

Pauses grow with every failure since the breaker was last closed, so a server that is up for its health checks and down
for its requests is not hammered either.
"""

from __future__ import annotations

import random as random_module
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

OPEN_AFTER = 3  # failures in a row: one may be a lost connection


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Pauses that double, each shortened by up to a half at random so that many who wait do not come back at once."""

    first_s: float = 0.25
    longest_s: float = 5.0

    def pause(self, n: int, random: Callable[[], float]) -> float:
        """Seconds of pause number ``n``, from 0; ``random`` draws from [0, 1)."""
        return min(self.longest_s, self.first_s * 2 ** min(n, 60)) * (1 - random() / 2)


class BreakerState(Enum):
    CLOSED = "closed"  # requests are sent
    OPEN = "open"  # none are
    HALF_OPEN = "half-open"  # one is, to try


class CircuitBreaker:
    """
    Args:
        open_after: failures in a row.
        backoff: pauses before each health check.
        clock: seconds, rising.
        random: draws from [0, 1).
    """

    def __init__(
        self,
        *,
        open_after: int = OPEN_AFTER,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self.state = BreakerState.CLOSED
        self.retry_at = 0.0  # by the clock: when an open breaker's server may be checked
        self._open_after = open_after
        self._backoff = backoff or Backoff()
        self._clock = clock
        self._random = random
        self._failures = 0  # in a row, while closed
        self._pauses = 0  # since it was last closed

    @property
    def closed(self) -> bool:
        return self.state is BreakerState.CLOSED

    def succeeded(self) -> None:
        """The server answered a request."""
        self.state = BreakerState.CLOSED
        self._failures = self._pauses = 0

    def failed(self) -> bool:
        """The server did not answer a request. True when this opened the breaker.

        Requests that were in flight when it opened fail too; they say nothing new and make no pause longer.
        """
        if self.state is BreakerState.OPEN:
            return False
        self._failures += 1
        if self.closed and self._failures < self._open_after:
            return False
        self.pause()
        return True

    def passed(self) -> None:
        """A health check passed: one request may try."""
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN

    def pause(self) -> None:
        """Opens, or stays open after a failed health check, for the next pause."""
        self.state = BreakerState.OPEN
        self.retry_at = self._clock() + self._backoff.pause(self._pauses, self._random)
        self._pauses += 1
