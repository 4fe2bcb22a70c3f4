"""Who is asked: decisions of endpoints in given states, without a server."""

from __future__ import annotations

import pytest

from opd.serving.breaker import CircuitBreaker
from opd.serving.endpoint import MEMORY_SECONDS, Endpoint, choose, choose_hedge, load
from opd.serving.http import JsonClient
from opd.serving.lateness import POLL_SECONDS, Lateness

pytestmark = pytest.mark.unit

NOW = 1000.0


def make(*in_flight: int, weights: tuple[float, ...] = (1.0, 1.0, 1.0), concurrency: int = 16) -> list[Endpoint]:
    made = []
    for n, (count, weight) in enumerate(zip(in_flight, weights, strict=False)):
        client = JsonClient(f"http://{n}")
        made.append(
            Endpoint(
                client=client,
                post=client.post_once,
                breaker=CircuitBreaker(open_after=1),
                weight=weight,
                concurrency=concurrency,
                in_flight=count,
            )
        )
    return made


def open_breaker(endpoint: Endpoint, *, half: bool = False) -> None:
    endpoint.breaker.failed()
    if half:
        endpoint.breaker.passed()


def chosen(endpoints: list[Endpoint], **given: object) -> int | None:
    endpoint = choose(endpoints, now=NOW, **given)  # type: ignore[arg-type]
    return None if endpoint is None else endpoints.index(endpoint)


def test_the_least_loaded_by_weight_and_the_first_of_equals() -> None:
    assert chosen(make(0, 0, 0)) == 0
    assert chosen(make(2, 1, 3)) == 1
    assert chosen(make(5, 2, 4, weights=(4.0, 1.0, 1.0))) == 0


def test_a_full_or_broken_endpoint_is_not_asked_and_a_half_open_one_gets_one_request() -> None:
    endpoints = make(16, 3, 15)
    open_breaker(endpoints[1])
    assert chosen(endpoints) == 2
    endpoints[2].in_flight = 16
    assert chosen(endpoints) is None
    endpoints[1].breaker.passed()
    endpoints[1].in_flight = 0
    assert chosen(endpoints) == 1
    endpoints[1].in_flight = 1
    assert chosen(endpoints) is None


def test_a_prompt_stays_where_its_prefix_is_unless_that_is_clearly_busier_or_broken() -> None:
    endpoints = make(0, 7, 0)
    assert chosen(endpoints, home=endpoints[1]) == 1  # a group of 8
    endpoints[1].in_flight = 8
    assert chosen(endpoints, home=endpoints[1]) == 0
    endpoints[1].in_flight = 1
    open_breaker(endpoints[1])
    assert chosen(endpoints, home=endpoints[1]) == 0


def test_a_request_goes_back_to_who_failed_it_only_when_nobody_else_works() -> None:
    endpoints = make(0, 9, 16)
    assert chosen(endpoints, shunned=endpoints[:1], home=endpoints[0]) == 1
    assert chosen(endpoints, shunned=endpoints[:2]) is None  # the third one works and will be free
    open_breaker(endpoints[2])
    assert chosen(endpoints, shunned=endpoints[:2]) == 0
    half_open = make(0, 0)
    open_breaker(half_open[1], half=True)
    assert chosen(half_open, shunned=half_open[:1]) == 1


def test_a_slow_endpoint_gets_its_share_by_speed_and_another_chance_later() -> None:
    endpoints = make(4, 0)
    endpoints[0].answered(1.0, NOW)
    endpoints[1].answered(10.0, NOW)
    assert load(endpoints[1], endpoints, NOW) == 10.0
    assert chosen(endpoints) == 0
    endpoints[0].in_flight = 10
    assert chosen(endpoints) == 1
    endpoints[0].in_flight = 4
    later = NOW + MEMORY_SECONDS + 1
    assert choose(endpoints, now=later) is endpoints[1]
    slightly = make(1, 1)
    slightly[0].answered(1.9, NOW)
    slightly[1].answered(1.0, NOW)
    assert chosen(slightly) == 0  # less than twice: not worth a difference


def test_an_overtaken_endpoint_is_as_slow_as_it_was_seen_to_be() -> None:
    (endpoint,) = make(0)
    endpoint.answered(4.0, NOW)
    endpoint.overtaken(3.0, NOW)  # at least 3 is no news
    assert endpoint.latency(NOW) == 4.0
    endpoint.overtaken(14.0, NOW)
    assert endpoint.latency(NOW) == pytest.approx(7.0)


def test_a_hedge_goes_to_a_healthy_quick_endpoint_that_is_not_full() -> None:
    endpoints = make(0, 0, 5)
    assert choose_hedge(endpoints, now=NOW, asked=endpoints[:1]) is endpoints[1]
    endpoints[0].answered(1.0, NOW)
    endpoints[1].answered(9.0, NOW)
    assert choose_hedge(endpoints, now=NOW, asked=endpoints[:1]) is endpoints[2]
    open_breaker(endpoints[2], half=True)
    assert choose_hedge(endpoints, now=NOW, asked=endpoints[:1]) is None


def test_a_request_is_late_after_a_multiple_of_the_median_of_its_kind() -> None:
    lateness = Lateness(3.0)
    for seconds in (0.3, 0.4, 0.5, 0.5, 0.6, 0.7, 9.0):
        lateness.add("score", seconds)
    assert lateness.after("score") is None and not lateness.late("score", 99.0)  # too few to tell
    assert lateness.multiple("score", 1.0) == 2.0
    lateness.add("score", 0.5)
    assert lateness.after("score") == 1.5
    assert (lateness.late("score", 1.4), lateness.late("score", 1.5)) == (False, True)
    assert (lateness.wait("score", 1.0), lateness.wait("score", 2.0)) == (0.5, POLL_SECONDS)
    for _ in range(8):
        lateness.add("quick", 0.01)
    assert lateness.after("quick") == 0.5
    assert lateness.after("other") is None and lateness.multiple("other", 7.0) == 1.0
    never = Lateness(0.0)
    for _ in range(8):
        never.add("score", 0.5)
    assert not never.late("score", 99.0)
