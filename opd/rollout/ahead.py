"""Rollouts written in the background while earlier ones are trained on: ``--async-rollout``.

One thread runs one job after the other, in the order in which they were given, so that the engine never has two
callers. A job is everything that a rollout needs beyond its prompts: the weights to write with, where the engine does
not hold them yet, then the answers and their scores. What it raises is raised where its result is taken.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class RolloutCancelled(Exception):
    """The run ends: nobody takes this rollout any more. Raised within the background thread only."""


@dataclass(frozen=True, kw_only=True)
class Taken(Generic[T]):
    """A rollout whose turn has come.

    Attributes:
        seconds_waited: until it was finished, on the thread that took it.
        seconds_written: that the background thread worked on it.
    """

    result: T
    seconds_waited: float
    seconds_written: float

    @property
    def overlap_share(self) -> float:
        """Of the rollout's time, the share in which nobody waited for it."""
        if self.seconds_written == 0:
            return 0.0
        return max(0.0, 1.0 - self.seconds_waited / self.seconds_written)


class BackgroundRollouts(Generic[T]):
    """A first-in, first-out line of rollouts. All methods but ``check`` belong to one thread, the trainer's."""

    def __init__(self, name: str = "rollout ahead") -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], T], Future[tuple[T, float]]] | None] = queue.SimpleQueue()
        self._untaken: deque[Future[tuple[T, float]]] = deque()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Rollouts that were started and not yet taken."""
        return len(self._untaken)

    def start(self, job: Callable[[], T]) -> None:
        """Puts ``job`` at the end of the line."""
        future: Future[tuple[T, float]] = Future()
        self._untaken.append(future)
        self._jobs.put((job, future))

    def take(self) -> Taken[T]:
        """Waits for the rollout at the head of the line.

        Raises:
            whatever its job raised.
        """
        started = time.monotonic()
        result, seconds = self._untaken.popleft().result()
        return Taken(result=result, seconds_waited=time.monotonic() - started, seconds_written=seconds)

    def drain(self) -> None:
        """Waits until no job runs or waits to run: the engine is idle then. The results stay to be taken."""
        wait(self._untaken)

    def check(self, _tokens: int = 0) -> None:
        """To be called by a job now and then: as each answer is finished.

        Raises:
            RolloutCancelled: ``close`` was called.
        """
        if self._ending.is_set():
            raise RolloutCancelled

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the thread as soon as the job that runs calls ``check``; later jobs do not start. Safe to call twice.

        A job that is stuck in its engine is left behind after ``timeout_s``: its thread ends with the process.
        """
        self._ending.set()
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None and not self._ending.is_set():
            job, future = entry
            started = time.monotonic()
            try:
                result = job()
            except BaseException as error:  # it belongs to the thread that takes the rollout, whatever it is
                future.set_exception(error)
            else:
                future.set_result((result, time.monotonic() - started))
