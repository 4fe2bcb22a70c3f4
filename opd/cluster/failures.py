"""Which of several ranks that ended was the first to go wrong, and how to say so."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from opd.cluster.processes import End, RankOrder


@dataclass(frozen=True, kw_only=True)
class EndedRank:
    """
    Args:
        node: address of its machine.
        end: None: the machine, or Ray's worker on it, is gone.
        lost: what Ray says about that.
    """

    order: RankOrder
    node: str
    end: End | None
    lost: str = ""

    @property
    def failed(self) -> bool:
        return self.end is None or self.end.status != 0

    @property
    def refused_its_flags(self) -> bool:
        """Exit status 2, as ``train.py`` ends when a flag names something that cannot be used."""
        return self.said_why and self.end.status == 2

    @property
    def leads(self) -> bool:
        """The training ranks' first one, which generates and reports."""
        return self.order.role == "actor" and self.order.rank == 0

    @property
    def said_why(self) -> bool:
        """It ended with a message for the person at the terminal."""
        return self.end is not None and self.end.report is not None and self.end.report.outcome == "refused"

    @property
    def tail(self) -> str:
        return "" if self.end is None else self.end.tail

    @property
    def title(self) -> str:
        return f"{self.order.shown} on {self.node}"


def cause(ended: list[EndedRank]) -> EndedRank:
    """The failed rank that the others' failures follow from.

    A rank that was killed, or that vanished, did so by no fault of the others. Of those that failed in their own code
    the first one counts; the others noticed that it was gone.
    """
    return min((rank for rank in ended if rank.failed), key=_order)


def sentence(rank: EndedRank) -> str:
    """One line for the person at the terminal."""
    report = rank.end and rank.end.report
    log = f"its log: {rank.order.log_path}"
    if rank.end is None:
        return f"{rank.title} is gone: {rank.lost or 'its machine does not answer'} ({log})"
    if report is not None and report.outcome in ("refused", "crashed"):
        return f"{report.message.rstrip('.')} ({rank.title}; {log})"
    return f"{rank.title} {_status(rank.end.status)} ({log})"


def _order(rank: EndedRank) -> tuple[int, float]:
    if rank.end is None:
        return 0, 0.0
    report = rank.end.report
    if report is None:
        return 0 if rank.end.status < 0 else 1, rank.end.at
    return 1, report.at


def _status(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    why = ", by hand or for want of memory" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{why}"
