"""SIGTERM, as a scheduler sends it before it takes a machine away: save, and leave with exit status 0.

With one rank the signal interrupts what can be repeated (a rollout, log-probs, an evaluation) and waits for what must
not be torn (an optimizer step, a checkpoint). With several ranks every step is finished, and the ranks agree between
two steps, because a save takes all of them. A second signal ends the run at once, as Ctrl-C does.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Preempted(BaseException):
    """The run stops because it was asked to. No ``Exception``: nothing that mends errors may catch it."""

    on_all_ranks = True  # see ``UserError``


class StopRequest:
    """Whether somebody asked the run to stop. Without ``listen`` nobody does.

    Args:
        alone: this is the run's only rank, so it may stop in the middle of a step.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.requested = False
        self._alone = alone
        self._interruptible = False

    def listen(self) -> None:
        """Takes SIGTERM over. To be called on the main thread."""
        signal.signal(signal.SIGTERM, self._ask)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The block can be repeated: it is left when a signal comes, or has come before. Not to be nested.

        Raises:
            Preempted: on the only rank of a run.
        """
        self._interruptible = self._alone
        try:
            if self._interruptible and self.requested:
                raise Preempted
            yield
        finally:
            self._interruptible = False

    def check(self, on_any_rank: Callable[[bool], bool]) -> None:
        """To be called between two steps, by all ranks together.

        Args:
            on_any_rank: whether its argument is true on at least one rank.

        Raises:
            Preempted: a signal came, on this rank or another; on all of them.
        """
        if on_any_rank(self.requested):
            self.requested = True
            raise Preempted

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._interruptible:
            raise Preempted
