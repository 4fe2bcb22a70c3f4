r"""Math answers compared by meaning (``\frac12`` equals ``0.5``), with a time limit that holds.

math-verify evaluates what the model wrote, and ``10^{10^{10}}`` keeps sympy inside one C call for hours. Its own limit
is a Unix signal, which works in the main thread only and cannot interrupt that call. So grading happens in helper
processes (``math_helper.py``) that are killed, and replaced, when an answer takes too long. What cannot be an answer
(``math_answer.py``) never reaches them.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading

from opd.rewards.math_answer import degenerate, last_boxed
from opd.rewards.math_helper import HelperEndedError, MathGraderError, MathHelper

__all__ = ["MathGrader", "MathGraderError", "grade_math", "last_boxed"]

logger = logging.getLogger(__name__)

TIME_LIMIT = 10.0  # seconds for one answer; usual ones take a few milliseconds
MAX_HELPERS = 8  # each holds 60 MB and more
# Seconds that an answer waits for the helpers there are before one more is started. A start costs about 2 s of a core,
# in which one helper grades some hundred usual answers: only slow ones are worth another.
PATIENCE = 0.5


class MathGrader:
    """Grades from any number of threads. The first answer starts a helper; answers that wait start further ones.

    Args:
        time_limit: seconds for one answer.
        helpers: the most processes at once. None: one for each core this process may use, 8 at most.
    """

    def __init__(self, time_limit: float = TIME_LIMIT, helpers: int | None = None) -> None:
        self._time_limit = time_limit
        self._helpers = helpers
        self._changed = threading.Condition()  # guards the three below
        self._started: set[MathHelper] = set()
        self._idle: list[MathHelper] = []  # the last one used is the next one used
        self._starting = False  # one at a time: while the first one imports sympy, the others need none of their own

    def grade(self, response: str, label: str) -> float:
        r"""1.0 where the response's final answer means the same as the label; 0.0 otherwise, or out of time.

        The final answer is the last ``\boxed{}``, or else the last expression. One that is far too long or nested far
        too deep to be an answer (``degenerate``) is wrong unread. An answer whose helper is ended by another process
        is graded again.

        Raises:
            MathGraderError: math-verify is not installed, or two helper processes ended by themselves on this answer.
        """
        if reason := degenerate(response, label):
            logger.info("the answer counts as wrong unread: %s (label %r)", reason, label)
            return 0.0
        # Of several boxes math-verify makes a set; the last is the answer, as MATH and its graders take it.
        answer = last_boxed(response) or response
        reference = last_boxed(label) or f"\\boxed{{{label.strip().strip('$')}}}"
        try:
            try:
                return float(self._grade(answer, reference))
            except HelperEndedError as error:
                logger.warning("%s; the answer is graded again (label %r)", error, label)
                return float(self._grade(answer, reference))
        except TimeoutError:
            logger.warning("grading took over %g s: the answer counts as wrong (label %r)", self._time_limit, label)
            return 0.0

    def close(self) -> None:
        """Ends the helper processes, after the answers in progress. Safe to call twice; ``grade`` starts new ones."""
        with self._changed:
            self._changed.wait_for(lambda: not self._starting and not self._busy(), timeout=self._time_limit)
            for helper in self._busy():
                helper.kill()
            for helper in self._idle:
                self._started.discard(helper)
                helper.stop()
            self._idle.clear()

    def pids(self) -> list[int]:
        """The helper processes there are now."""
        with self._changed:
            return [helper.pid for helper in self._started]

    def _grade(self, answer: str, reference: str) -> bool:
        helper = self._take()
        usable = False
        try:
            right = helper.grade(answer, reference)
            usable = True
            return right
        finally:
            self._give_back(helper, usable)

    def _take(self) -> MathHelper:
        """A helper for this thread alone: an idle one, or a new one where none came free within ``PATIENCE``."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._idle or not (self._started or self._starting), timeout=PATIENCE)
                while self._idle:
                    helper = self._idle.pop()
                    if helper.alive:
                        return helper
                    self._drop(helper)
                if not self._starting and len(self._started) < (self._helpers or _default_helpers()):
                    self._starting = True
                    break
        try:
            helper = MathHelper(self._time_limit)
            with self._changed:
                self._started.add(helper)
            return helper
        finally:
            with self._changed:
                self._starting = False
                self._changed.notify_all()

    def _give_back(self, helper: MathHelper, usable: bool) -> None:
        with self._changed:
            if usable:
                self._idle.append(helper)
            else:
                self._drop(helper)
            self._changed.notify_all()

    def _drop(self, helper: MathHelper) -> None:
        self._started.discard(helper)
        helper.stop()

    def _busy(self) -> set[MathHelper]:
        return self._started.difference(self._idle)


def _default_helpers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_HELPERS)


_shared = MathGrader()
atexit.register(_shared.close)


def grade_math(response: str, label: str) -> float:
    """``MathGrader.grade`` on the process's one grader."""
    return _shared.grade(response, label)
