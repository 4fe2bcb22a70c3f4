"""How many tokens the student's server drafts in a block, from ``opd.decoding.draft_length``.

There a round is one block of every answer; here each answer goes at its own pace. So a length is kept until as many
blocks of it have ended as answers are in flight, and these together count as one round: the seconds of a block of one
length among blocks of other lengths would say little about that length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opd.decoding.draft_length import DraftLength


class BlockLength:
    def __init__(self, length: DraftLength) -> None:
        self._length = length
        self._answers = 0  # in flight
        self._planned: int | None = None
        self._seconds: list[float] = []  # of whole blocks of the planned length
        self._judged = self._accepted = self._ended = 0

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around the writing of one answer."""
        self._answers += 1
        try:
            yield
        finally:
            self._answers -= 1

    def choose(self) -> int:
        if self._planned is None:
            self._planned = self._length.choose(self._answers)
        return self._planned

    def observe(self, planned: int, drafted: int, *, seconds: float, judged: int, accepted: int) -> None:
        """Of one block, for which ``planned`` tokens were chosen; fewer are drafted before a stop token or a limit."""
        if planned != self._planned:  # begun in an earlier round
            return
        self._ended += 1
        self._judged += judged
        self._accepted += accepted
        if drafted == planned:
            self._seconds.append(seconds)
        if self._ended >= self._answers and self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
            self._length.observe(self._answers, planned, seconds=mean, judged=self._judged, accepted=self._accepted)
            self._planned = None
            self._seconds = []
            self._judged = self._accepted = self._ended = 0
