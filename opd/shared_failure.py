"""A failure that one rank alone sees stops all of them together: only so can they save what was learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from opd.errors import FirstRankError, UserError
from opd.interfaces import Trainer

Result = TypeVar("Result")


def share_failure(trainer: Trainer, work: Callable[[], Result]) -> Result:
    """``work()``, in which the first rank, which generates, has a part of its own. Called by all ranks together; where
    they wait for each other within ``work``, the first one does so to the end, also when its own part fails.

    Raises:
        UserError: what ``work`` raised on the first rank: there as it was, elsewhere as ``FirstRankError``.
    """
    failure: UserError | None = None
    result: Result | None = None
    try:
        result = work()
    except UserError as error:
        failure = error
    reason = trainer.from_first_rank(None if failure is None else str(failure))
    if reason is not None:
        failure = failure or FirstRankError(reason)
        failure.on_all_ranks = True
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # ``work`` has returned it
