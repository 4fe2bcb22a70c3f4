"""The circuit breaker's states, one transition after the other, under a clock that the test moves."""

from __future__ import annotations

import pytest

from opd.serving.breaker import Backoff, BreakerState, CircuitBreaker

pytestmark = pytest.mark.unit

BACKOFF = Backoff(first_s=1.0, longest_s=6.0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(open_after=3, backoff=BACKOFF, clock=clock, random=lambda: 0.5)


def test_only_failures_in_a_row_open_it() -> None:
    breaker = make(Clock())
    assert [breaker.failed(), breaker.failed()] == [False, False]
    breaker.succeeded()
    assert [breaker.failed(), breaker.failed(), breaker.failed()] == [False, False, True]
    assert breaker.state is BreakerState.OPEN


def test_late_failures_of_requests_that_were_in_flight_change_nothing() -> None:
    clock = Clock()
    breaker = make(clock)
    for _ in range(3):
        breaker.failed()
    assert breaker.retry_at == 100.75
    clock.now = 100.5
    assert [breaker.failed() for _ in range(60)] == [False] * 60
    assert breaker.retry_at == 100.75


def test_half_open_closes_on_success_and_opens_on_the_first_failure() -> None:
    breaker = make(Clock())
    breaker.passed()
    assert breaker.closed  # a health check says nothing new about a closed one
    for _ in range(3):
        breaker.failed()
    breaker.passed()
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.failed() is True
    assert breaker.state is BreakerState.OPEN
    breaker.passed()
    breaker.succeeded()
    assert breaker.closed
    assert breaker.failed() is False  # and it counts from 0 again


def test_pauses_grow_until_it_closes_whatever_the_health_checks_say() -> None:
    clock = Clock()
    breaker = make(clock)
    for _ in range(3):
        breaker.failed()
    pauses = [breaker.retry_at - clock.now]
    breaker.pause()  # the health check failed
    pauses.append(breaker.retry_at - clock.now)
    for _ in range(3):  # it passes, and the request fails
        breaker.passed()
        breaker.failed()
        pauses.append(breaker.retry_at - clock.now)
    assert pauses == [0.75, 1.5, 3.0, 4.5, 4.5]
    breaker.succeeded()
    for _ in range(3):
        breaker.failed()
    assert breaker.retry_at - clock.now == 0.75


def test_pauses_are_spread_over_the_upper_half() -> None:
    assert BACKOFF.pause(1, lambda: 0.0) == 2.0
    assert BACKOFF.pause(1, lambda: 0.999) == pytest.approx(1.0, abs=0.01)
    assert BACKOFF.pause(10_000, lambda: 0.0) == 6.0
