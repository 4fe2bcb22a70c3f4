"""Counters of several endpoints together."""

from __future__ import annotations

from opd.serving.endpoint import Endpoint
from opd.serving.http_stats import HttpStats
from opd.serving.turns import Turns


class PoolStats:
    """With ``HttpStats``'s way to take them."""

    def __init__(self, endpoints: list[Endpoint], turns: Turns) -> None:
        self._endpoints = endpoints
        self._turns = turns

    def take(self) -> HttpStats:
        """Returns the sums and sets the counters to zero."""
        return self.take_each()[0]

    def take_each(self) -> tuple[HttpStats, list[HttpStats]]:
        """The same, with each endpoint's own, in the order of the addresses. All endpoints share one queue."""
        each = [endpoint.client.stats.take() for endpoint in self._endpoints]
        total = HttpStats.merged(each)
        total.queue_max, self._turns.queue_max = self._turns.queue_max, 0
        return total, each
