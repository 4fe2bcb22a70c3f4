"""A training rank in this process: builds the parts of the run and takes its steps."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack

from opd.cluster.place import ALONE, Place
from opd.config.schema import Config
from opd.preemption import StopRequest


def run_rank(config: Config, stop: StopRequest, place: Place = ALONE) -> None:
    """Returns after the last step.

    Raises:
        UserError, Preempted, KeyboardInterrupt: see ``opd.step.run``.
    """
    with ExitStack() as stack:
        with stop.interruptible():
            from opd.build import build
            from opd.step import run

            parts, state = build(config, stack, stop, _with_teacher(config, place, stack))
        run(parts, state)


def _with_teacher(config: Config, place: Place, stack: ExitStack) -> Place:
    """Starts the servers of --opd-teacher-serve, on rank 0, unless the launcher has started them."""
    leader = int(os.environ.get("RANK", "0")) == 0
    if config.opd.opd_teacher_serve is None or place.teacher_url is not None or not leader:
        return place
    from opd.serving.hosts import ThisMachine
    from opd.serving.teacher_servers import TeacherServers

    servers = stack.enter_context(TeacherServers(config, ThisMachine()))
    servers.wait_ready()
    return dataclasses.replace(place, teacher_url=servers.url)
