"""Waiting for whoever did not score a rollout's samples, such as a teacher whose server is being restarted."""

from __future__ import annotations

import itertools
import logging
import random as random_module
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from opd.interfaces import ScoredAgain
from opd.serving.breaker import Backoff
from opd.types import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoreWait:
    """
    Args:
        scorer: asked again for the samples that lack a score, and for no others.
        largest_share: of samples without a score that is put up with.
        seconds: to wait at most; 0: not at all.
        backoff: pauses between the rounds of asking, in which the scorer may wait too.
    """

    scorer: ScoredAgain
    largest_share: float
    seconds: float
    backoff: Backoff = Backoff(first_s=1.0, longest_s=30.0)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random_module.random

    def __call__(self, samples: list[Sample], ask: Callable[[Sample], Future[Any]]) -> None:
        """Fills in ``reward`` of ``samples`` that all have one, until few enough lack a score, or the time is over.

        Ctrl-C and signals that raise end it.

        Args:
            ask: starts ``scorer.score_again`` of a sample.
        """
        missing = self._missing(samples)
        if self.seconds == 0 or not missing:
            return
        logger.warning(
            "%d of %d samples have no teacher score, more than a share of %g: waiting up to %.0f s for the teacher, "
            "and asking again",
            *(sum(map(self.scorer.unscored, samples)), len(samples), self.largest_share, self.seconds),
        )
        started = self.clock()
        for rounds in itertools.count():
            self._ask_once(missing, ask, until=started + self.seconds)
            missing = self._missing(samples)
            left = started + self.seconds - self.clock()
            if not missing or left <= 0:
                break
            self.sleep(min(left, self.backoff.pause(rounds, self.random)))
        logger.warning(
            "after %.0f s, %d of %d samples have no teacher score",
            *(self.clock() - started, sum(map(self.scorer.unscored, samples)), len(samples)),
        )

    def _missing(self, samples: list[Sample]) -> list[Sample]:
        """Those worth asking for again; none when few enough lack a score."""
        unscored = sum(map(self.scorer.unscored, samples))
        if unscored <= self.largest_share * len(samples):
            return []
        return [sample for sample in samples if self.scorer.may_be_scored(sample)]

    def _ask_once(self, samples: list[Sample], ask: Callable[[Sample], Future[Any]], *, until: float) -> None:
        asked = {ask(sample): sample for sample in samples}
        try:
            done = wait(asked, timeout=max(0.0, until - self.clock())).done
            for future in done:
                asked[future].reward = future.result()
        finally:
            for future in asked:
                future.cancel()
