"""The cursor over the rows of a data file: epoch after epoch, in an order that a resumed run finds again."""

from __future__ import annotations

import logging
import random
from typing import Any

logger = logging.getLogger(__name__)


class Epochs:
    """
    Args:
        count: rows, at least 1.
        shuffle: epoch ``e`` is shuffled with ``seed + e``; without it every epoch is 0, 1, ... count - 1.
    """

    def __init__(self, count: int, *, shuffle: bool, seed: int) -> None:
        self._count = count
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)

    def take(self, n: int) -> list[int]:
        """The next ``n`` row numbers, from 0; an epoch that ends on the way is followed by the next."""
        taken: list[int] = []
        while len(taken) < n:
            if self._position == self._count:
                self._epoch += 1
                self._position = 0
                self._order = self._order_of(self._epoch)
            chosen = self._order[self._position : self._position + n - len(taken)]
            taken += chosen
            self._position += len(chosen)
        return taken

    def state(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"epoch": self._epoch, "position": self._position, "shuffle": self._shuffle, "seed": self._seed}

    def restore(self, state: dict[str, Any]) -> None:
        """Moves to where ``state`` was taken. Another order (seed, shuffling) is used, with a warning."""
        if (state["shuffle"], state["seed"]) != (self._shuffle, self._seed):
            before, now = (state["shuffle"], state["seed"]), (self._shuffle, self._seed)
            logger.warning(
                "(--rollout-shuffle, --rollout-seed) was %s in the checkpoint and is %s now: the rest of epoch %d may "
                "repeat or miss prompts",
                *(before, now, state["epoch"]),
            )
        self._epoch = state["epoch"]
        self._position = state["position"]
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(self._count))
        if self._shuffle:
            random.Random(self._seed + epoch).shuffle(order)
        return order
