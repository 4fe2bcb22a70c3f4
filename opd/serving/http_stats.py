"""Counters of requests to one server or several, and how long their answers took."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

KEPT_LATENCIES = 2048  # the latest ones: enough for a 99th percentile, 16 KB

PERCENTILES = (50, 95, 99)


def _latencies() -> deque[float]:
    return deque(maxlen=KEPT_LATENCIES)


@dataclass(kw_only=True)
class HttpStats:
    """Counters since the last ``take``."""

    requests: int = 0  # attempts sent, retries and hedges included
    retries: int = 0
    failures: int = 0  # requests given up
    bytes: int = 0  # of answers
    seconds: float = 0.0  # summed over requests in flight, so it may exceed the wall time
    errors: int = 0  # attempts without an answer that can be used
    hedges: int = 0  # attempts sent here because another endpoint took long
    hedge_wins: int = 0  # those of them that answered first
    breaker_openings: int = 0
    queue_max: int = 0  # most requests that waited for their turn at one time
    latencies: deque[float] = field(default_factory=_latencies)  # seconds of good answers

    def take(self) -> HttpStats:
        """Returns the counters and sets them to zero."""
        taken = HttpStats(**{f.name: getattr(self, f.name) for f in fields(self)})
        self.__dict__.update(HttpStats().__dict__)
        return taken

    def numbers(self) -> dict[str, float]:
        """By name: the counters, and where there were answers ``latency_p50``, ``_p95`` and ``_p99`` in seconds."""
        counters = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "latencies"}
        return counters | {f"latency_p{p}": value for p, value in percentiles(self.latencies).items()}

    @classmethod
    def merged(cls, parts: Iterable[HttpStats]) -> HttpStats:
        """Sums; the largest ``queue_max``; all latencies, of which the last parts' are kept when they are too many."""
        total = cls()
        for part in parts:
            for f in fields(cls):
                if f.name == "latencies":
                    total.latencies.extend(part.latencies)
                elif f.name == "queue_max":
                    total.queue_max = max(total.queue_max, part.queue_max)
                else:
                    setattr(total, f.name, getattr(total, f.name) + getattr(part, f.name))
        return total


def percentiles(values: Iterable[float]) -> dict[int, float]:
    """Nearest-rank percentiles; none of no values."""
    ordered = sorted(values)
    return {p: ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in PERCENTILES} if ordered else {}
