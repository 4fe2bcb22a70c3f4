"""Which rollout is planned, started and taken when: one after the other, or some steps ahead of the training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from opd.rollout.ahead import BackgroundRollouts, Taken
from opd.rollout.driver import RolloutResult
from opd.rollout.plan import RolloutPlan

Write = Callable[..., RolloutResult | None]


class RolloutLine:
    """Every rank has one, so that all move the data cursors alike; only the one with ``background`` writes ahead.

    Args:
        plan: the plan of a step; called once per step, in order.
        write: writes a plan; called once per plan, in order; gets ``check`` to call as each answer is finished.
        background: None with the synchronous order, and on ranks that do not generate.
        version: of the weights that the engine holds.

    Attributes:
        version: of the weights that the engine holds, or will hold when the next rollout starts.
    """

    def __init__(
        self,
        plan: Callable[[int], RolloutPlan],
        write: Write,
        background: BackgroundRollouts[RolloutResult | None] | None,
        *,
        version: int,
    ) -> None:
        self.version = version
        self._plan = plan
        self._write = write
        self._background = background
        self._planned: deque[RolloutPlan] = deque()
        self._next_step = version + 1

    @property
    def started_through(self) -> int:
        """The last step whose rollout is planned."""
        return self._next_step - 1

    def write_now(self) -> tuple[RolloutPlan, RolloutResult | None]:
        """The next step's rollout, written while the caller waits."""
        plan = self._plan_next()
        return plan, self._write(plan)

    def start_through(self, step: int, *, load_weights: Callable[[], None] | None = None) -> None:
        """Starts, in the background, every rollout up to that of ``step``; ``load_weights`` runs before the first."""
        while self._next_step <= step:
            plan = self._plan_next()
            self._planned.append(plan)
            if self._background is not None:
                self._background.start(partial(self._load_and_write, plan, load_weights))
            load_weights = None

    def take(self) -> tuple[RolloutPlan, Taken[RolloutResult | None]]:
        """Waits for the earliest rollout that was started.

        Raises:
            whatever writing it raised.
        """
        plan = self._planned.popleft()
        if self._background is None:
            return plan, Taken(result=None, seconds_waited=0.0, seconds_written=0.0)
        return plan, self._background.take()

    def drain(self) -> None:
        """Waits until the engine is idle; what was written stays to be taken."""
        if self._background is not None:
            self._background.drain()

    def _plan_next(self) -> RolloutPlan:
        plan = self._plan(self._next_step)
        self._next_step += 1
        return plan

    def _load_and_write(self, plan: RolloutPlan, load_weights: Callable[[], None] | None) -> RolloutResult | None:
        if load_weights is not None:
            load_weights()
        return self._write(plan, check=self._background.check)
