"""When a request is late: it takes much longer than the latest ones of its kind did."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Hashable

RECENT_ANSWERS = 64  # of each kind, behind the median
FEWEST_ANSWERS = 8  # that a median takes to call a request late

LEAST_SECONDS = 0.5  # nothing is late before: a second request would cost more than it saves
POLL_SECONDS = 0.25  # how often a running request is compared with what others took by now


class Lateness:
    """
    Args:
        factor: of the median latency; 0: nothing is ever late.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._recent: dict[Hashable, deque[float]] = {}  # by kind: seconds of good answers, over all endpoints

    def add(self, kind: Hashable, seconds: float) -> None:
        self._recent.setdefault(kind, deque(maxlen=RECENT_ANSWERS)).append(seconds)

    def after(self, kind: Hashable) -> float | None:
        """Seconds after which a request is late; None: not known yet, or never."""
        recent = self._recent.get(kind, ())
        if self._factor == 0 or len(recent) < FEWEST_ANSWERS:
            return None
        return max(LEAST_SECONDS, self._factor * statistics.median(recent))

    def late(self, kind: Hashable, elapsed: float) -> bool:
        after = self.after(kind)
        return after is not None and elapsed >= after

    def wait(self, kind: Hashable, elapsed: float) -> float:
        """Seconds until a request that has run for ``elapsed`` is worth a look."""
        if self._factor == 0:
            return math.inf
        after = self.after(kind)
        return POLL_SECONDS if after is None or after <= elapsed else after - elapsed

    def multiple(self, kind: Hashable, seconds: float) -> float:
        """``seconds`` over the median of its kind; 1 without any answer yet."""
        recent = self._recent.get(kind)
        median = statistics.median(recent) if recent else 0.0
        return seconds / median if median > 0 else 1.0
