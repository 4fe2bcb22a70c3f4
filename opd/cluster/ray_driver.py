"""A run over Ray, from the process that was started by hand: places the ranks, shows the first one's output, waits.

The ranks run what they run under torchrun; no step passes through this process.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack

from opd.cluster.failures import cause, sentence
from opd.cluster.processes import ClusterError
from opd.cluster.ray_crew import Crew
from opd.cluster.ray_session import has_gpus, ray_session, reserved
from opd.config.flags import ConfigError
from opd.config.schema import Config
from opd.preemption import Preempted, StopRequest
from opd.report.relay import Relay
from opd.serving.teacher_servers import TeacherServers

logger = logging.getLogger(__name__)

FAREWELL_SECONDS = 5.0  # for the other ranks to notice that one is gone; rank 0 then prints its summary
REPORT_SECONDS = 120.0  # for rank 0 to write its report, after an error that stops all ranks
INTERRUPT_SECONDS = 60.0  # for a run of one rank to save after Ctrl-C


def run_over_ray(config: Config, address: str | None) -> None:
    """Returns after the last step; stops what it has started, however it is left.

    Args:
        address: of a running cluster; None: one of this machine, for the time of the run.

    Raises:
        ClusterError: no cluster, not enough devices, or a rank that ended; the end of its log is on stderr.
        ConfigError: a rank found data or folders that cannot be used.
        EngineError: a teacher server that did not come up.
        Preempted: SIGTERM came; the ranks have saved.
        KeyboardInterrupt: Ctrl-C; the ranks got it too.
    """
    stop = StopRequest(alone=True)
    with ExitStack() as stack:
        with stop.interruptible():
            namespace = stack.enter_context(ray_session(config, address))
            stop.listen()  # after Ray, which takes the signal for itself
            on_gpus = has_gpus()
            reservations = stack.enter_context(reserved(config, on_gpus=on_gpus, own=address is None))
            crew = Crew(config, reservations, namespace=namespace, gpus=on_gpus)
            stack.callback(crew.stop)
            crew.seat()
            teacher_url = None
            if config.opd.opd_teacher_serve is not None:
                teachers = stack.enter_context(TeacherServers(config, crew.teacher_host()))
                teachers.wait_ready()
                teacher_url = teachers.url
            crew.start(teacher_url)
        _watch(crew, stop)


def _watch(crew: Crew, stop: StopRequest) -> None:
    relay = Relay()
    try:
        crew.watch(relay.write, _Until(crew, stop))
    except KeyboardInterrupt:
        crew.signal(signal.SIGINT)
        deadline = time.monotonic() + INTERRUPT_SECONDS
        crew.watch(relay.write, lambda: time.monotonic() > deadline)
        raise
    ended = crew.ended()
    if any(rank.failed for rank in ended):
        if stop.requested and all(rank.end is not None and rank.end.status in (0, -signal.SIGTERM) for rank in ended):
            raise Preempted  # it came before the ranks could listen: nothing was learned
        first = cause(ended)
        if not first.leads:  # rank 0's output is on the terminal already
            Relay(errors=True).block(f"end of the log of {first.title}", first.tail)
        raise (ConfigError if first.refused_its_flags else ClusterError)(sentence(first))
    if any(rank.end.report is not None and rank.end.report.outcome == "preempted" for rank in ended):
        raise Preempted


class _Until:
    """Passes SIGTERM on, once, and says when there is nothing to wait for: a rank has failed, and a moment later."""

    def __init__(self, crew: Crew, stop: StopRequest, now: Callable[[], float] = time.monotonic) -> None:
        self._crew = crew
        self._stop = stop
        self._now = now
        self._passed_on = False
        self._failed_at: float | None = None

    def __call__(self) -> bool:
        if self._stop.requested and not self._passed_on:
            self._passed_on = True
            self._crew.signal(signal.SIGTERM)
        ended = self._crew.ended()
        failed = [rank for rank in ended if rank.failed]
        if not failed:
            return False
        if self._failed_at is None:
            self._failed_at = self._now()
        reporting = all(rank.said_why for rank in failed) and not any(rank.leads for rank in ended)
        return self._now() > self._failed_at + (REPORT_SECONDS if reporting else FAREWELL_SECONDS)
