"""A training rank in this process: builds the parts of the run and takes its steps."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
        with what_lives_on_left_out_of_gc():
            run(parts, state)


@contextmanager
def what_lives_on_left_out_of_gc() -> Iterator[None]:
    """What is there now stays until the end of the block. It is over half a million objects, most of them of imported
    modules, and each full collection would look at all of them again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
