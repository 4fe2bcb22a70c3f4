"""Where the seconds of one step go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("rollout", "teacher", "train", "sync"), 0.0)
        self._start = time.monotonic()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] += time.monotonic() - started

    def metrics(self) -> dict[str, Any]:
        return {f"time_{k}": v for k, v in self.seconds.items()} | {"time_step": time.monotonic() - self._start}
