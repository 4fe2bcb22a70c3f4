"""Saves in the background: their order, what a failure stops, and when it is heard of."""

from __future__ import annotations

import logging
import threading

import pytest

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]


def test_jobs_run_in_order_while_the_caller_goes_on() -> None:
    from opd.megatron_backend.save_line import SaveLine

    line, may_end, done = SaveLine(background=True), threading.Event(), []
    line.add(lambda group: (may_end.wait(10), done.append("critic")))
    line.add(lambda group: done.append((group is not None, threading.current_thread() is threading.main_thread())))
    assert line.writing and done == []
    may_end.set()
    line.settle()
    assert done == ["critic", (True, False)]  # on a thread, in a process group of their own
    assert not line.writing
    line.close()


def test_a_failure_stops_those_behind_it_and_is_heard_of_once() -> None:
    from opd.megatron_backend.checkpoint_layout import CheckpointError
    from opd.megatron_backend.save_line import SaveLine

    def fail(group: object) -> None:
        raise CheckpointError("disk full")

    line, done = SaveLine(background=True), []
    line.add(fail)
    line.add(lambda group: done.append("student"))
    with pytest.raises(CheckpointError, match="disk full"):
        line.settle()
    assert done == []
    line.add(lambda group: done.append("next step"))
    line.settle()
    assert done == ["next step"]
    line.close()


def test_closing_waits_and_reports(caplog: pytest.LogCaptureFixture) -> None:
    from opd.megatron_backend.save_line import SaveLine

    def lose_the_others(group: object) -> None:
        raise RuntimeError("Connection closed by peer")

    line = SaveLine(background=True)
    line.add(lose_the_others)
    with caplog.at_level(logging.ERROR):
        line.close()
    assert "could not be completed: Connection closed by peer" in caplog.text


def test_without_a_thread_a_job_fails_where_it_is_added() -> None:
    from opd.megatron_backend.checkpoint_layout import CheckpointError
    from opd.megatron_backend.save_line import SaveLine

    def fail(group: object) -> None:
        raise CheckpointError("disk full")

    with pytest.raises(CheckpointError, match="disk full"):
        SaveLine().add(fail)
