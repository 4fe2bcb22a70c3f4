"""Checkpoints written one after the other: at once, or on a thread while training goes on (``--async-save``).

The files of a save are written by this process, so that none is left over when it is killed. The ranks agree about
them in a process group without a time-out: one whose files are written waits for the slowest disk, and notices at once
that another is gone. A job that fails stops those behind it: a student's checkpoint never appears without the critic's
or the moving average's, which go before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch.distributed as dist

from opd.megatron_backend.checkpoint_layout import CheckpointError
from opd.megatron_backend.groups import FOREVER, patient_group

logger = logging.getLogger(__name__)

Job = Callable[[dist.ProcessGroup | None], object]


class SaveLine:
    """All ranks call each method together, with jobs for the same files.

    Args:
        background: run jobs on a thread. They must then hold copies of what they write.
    """

    def __init__(self, *, background: bool = False) -> None:
        self.background = background
        self._thread: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._under_way: list[Future[object]] = []
        self._failed = False

    def add(self, job: Job) -> None:
        """Runs the job, or puts it behind those that are under way.

        Raises:
            CheckpointError: without ``background``, when the job fails.
        """
        if not self.background:
            job(patient_group() if dist.get_world_size() > 1 else None)
            return
        if self._thread is None:
            # Of its own: the thread has no part in the order of what the training ranks do together.
            self._group = dist.new_group(backend="gloo", timeout=FOREVER)
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._under_way.append(self._thread.submit(self._run, job))

    @property
    def writing(self) -> bool:
        """Whether this rank still has something to do."""
        return not all(future.done() for future in self._under_way)

    @property
    def empty(self) -> bool:
        """Whether nothing was added since ``settle``: the same on all ranks."""
        return not self._under_way

    def settle(self) -> None:
        """Waits for all jobs.

        Raises:
            CheckpointError: the first that failed, on all ranks. Those behind it were left out.
        """
        under_way, self._under_way = self._under_way, []
        errors = [future.exception() for future in under_way]
        self._failed = False
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Waits for what is under way; without a ``settle`` before it, a failure is only logged."""
        try:
            self.settle()
        except CheckpointError as error:
            logger.error("%s", error)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _run(self, job: Job) -> object:
        if self._failed:
            return None
        try:
            return job(self._group)
        except RuntimeError as error:  # the other ranks are gone: gloo says so
            self._failed = True
            raise CheckpointError(f"a checkpoint could not be completed: {error}") from error
        except CheckpointError:
            self._failed = True
            raise
