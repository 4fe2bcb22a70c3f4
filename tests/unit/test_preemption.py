"""SIGTERM: what it interrupts, what it waits for, and the second one."""

import os
import signal

import pytest

from opd.preemption import Preempted, StopRequest


@pytest.fixture
def handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def listening(**options) -> StopRequest:
    stop = StopRequest(**options)
    stop.listen()
    return stop


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100):  # the handler runs between two bytecodes
        pass


def alone(yes: bool) -> bool:
    return yes


def test_it_leaves_what_can_be_repeated_and_waits_for_the_rest(handler):
    stop = listening()
    stop.check(alone)
    reached = []
    with pytest.raises(Preempted), stop.interruptible():
        ask()
        reached.append("after the signal")
    assert reached == []

    stop = listening()
    ask()  # an optimizer step, say
    with pytest.raises(Preempted), stop.interruptible():
        reached.append("begun")
    assert reached == []
    with pytest.raises(Preempted):
        stop.check(alone)


def test_several_ranks_stop_together_between_two_steps(handler):
    told, other = listening(alone=False), StopRequest(alone=False)
    told.listen()
    with told.interruptible():
        ask()
    for stop in (told, other):
        with pytest.raises(Preempted):
            stop.check(lambda yes: yes or told.requested)
    assert other.requested


def test_a_second_signal_ends_at_once(handler):
    listening()
    ask()
    with pytest.raises(KeyboardInterrupt):
        ask()
