"""A pool in front of fake servers with faults: what is lost (nothing), who is asked, and what is left running."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from opd.serving.addresses import addresses
from opd.serving.breaker import Backoff
from opd.serving.endpoint_pool import EndpointPool, PoolSettings
from opd.serving.http import HttpError
from tests.unit.serving.fake_sglang import FakeSGLang

pytestmark = pytest.mark.unit

SETTINGS = PoolSettings(
    timeout_s=2.0,
    retries=1,
    deadline_s=5.0,
    retry_backoff=Backoff(first_s=0.005, longest_s=0.02),
    breaker_backoff=Backoff(first_s=0.02, longest_s=0.1),
)


def payload(n: int) -> dict[str, Any]:
    return {"input_ids": [n, 1, 2], "logprob_start_len": 0}


def ids(fake: FakeSGLang) -> list[int]:
    return [request["input_ids"][0] for request in fake.requests]


def with_pool(fakes: list[FakeSGLang], test: Callable[[EndpointPool], Awaitable[Any]], **changes: Any) -> Any:
    """What ``test`` returns, given a pool over running fakes. No task may outlive the pool."""

    async def run() -> Any:
        async with AsyncExitStack() as stack:
            for fake in fakes:
                await stack.enter_async_context(fake.running())
            before = asyncio.all_tasks()
            pool = EndpointPool(addresses(",".join(fake.url for fake in fakes)), replace(SETTINGS, **changes))
            result = await test(pool)
            await pool.close()
            assert not {task for task in asyncio.all_tasks() - before if "opd" in str(task.get_coro())}
            assert [endpoint.in_flight for endpoint in pool.endpoints] == [0] * len(fakes)
            return result

    return asyncio.run(run())


async def ask_all(pool: EndpointPool, count: int) -> list[Any]:
    return await asyncio.gather(*(pool.post("/generate", payload(n)) for n in range(count)))


def test_load_is_spread_by_weight_and_answers_are_asked_for_once() -> None:
    fakes = [FakeSGLang(), FakeSGLang()]

    async def test(pool: EndpointPool) -> Any:
        pool.endpoints[0].weight = 3.0
        await ask_all(pool, 40)
        return pool.stats.take_each()

    total, each = with_pool(fakes, test)
    assert sorted(ids(fakes[0]) + ids(fakes[1])) == list(range(40))
    assert [len(fake.requests) for fake in fakes] == [30, 10]
    assert [stats.requests for stats in each] == [len(fake.requests) for fake in fakes]
    assert (total.requests, total.retries, total.hedges, total.errors) == (40, 0, 0, 0)


def test_the_requests_of_a_prompt_share_an_endpoint() -> None:
    fakes = [FakeSGLang(), FakeSGLang(), FakeSGLang()]

    async def test(pool: EndpointPool) -> None:
        jobs = [pool.job(prefix=n % 6) for n in range(24)]
        await asyncio.gather(*(pool.post("/generate", payload(n % 6), job=job) for n, job in enumerate(jobs)))

    with_pool(fakes, test)
    assert [len(set(ids(fake))) for fake in fakes] == [2, 2, 2]
    assert [len(fake.requests) for fake in fakes] == [8, 8, 8]


def test_a_failed_request_goes_to_another_endpoint_first() -> None:
    fakes = [FakeSGLang(500, "truncated", 500, "truncated"), FakeSGLang()]

    async def test(pool: EndpointPool) -> Any:
        await ask_all(pool, 4)
        return pool.stats.take_each()

    total, each = with_pool(fakes, test)
    assert len(fakes[0].requests) == 2
    assert sorted(ids(fakes[1])) == [0, 1, 2, 3]
    assert [stats.errors for stats in each] == [2, 0]
    assert [stats.retries for stats in each] == [0, 2]
    assert total.failures == 0


@pytest.mark.parametrize("several", [False, True])
def test_503_for_longer_than_all_retries_loses_nothing(several: bool) -> None:
    fakes = [FakeSGLang(*[503] * 60) for _ in range(1 + several)]

    async def test(pool: EndpointPool) -> Any:
        asyncio.get_running_loop().call_later(0.6, lambda: [fake.faults.clear() for fake in fakes])
        await ask_all(pool, 24)
        return pool.stats.take()

    stats = with_pool(fakes, test, retries=0, concurrency=8)
    assert stats.failures == 0
    # Nobody hammers it: each first attempt, then one probe after each pause.
    assert stats.errors <= (8 + 10) * len(fakes)
    assert stats.requests == 24 + stats.errors
    assert stats.breaker_openings >= 3


def test_a_server_killed_and_restarted_on_its_port_loses_nothing_and_repeats_no_answer() -> None:
    async def run() -> tuple[list[int], list[int], Any]:
        first, second = FakeSGLang(), FakeSGLang()
        first.delay_s = 0.1
        async with AsyncExitStack() as stack:
            async with first.running():
                pool = EndpointPool(addresses(first.url), replace(SETTINGS, retries=0, concurrency=4))
                everything = asyncio.gather(*(pool.post("/generate", payload(n)) for n in range(12)))
                await asyncio.sleep(0.05)
                first.delay_s = 30.0
                await asyncio.sleep(0.1)  # four are answered, four in flight
            await asyncio.sleep(0.3)
            await stack.enter_async_context(second.running(int(first.url.rsplit(":", 1)[1])))
            await everything
            stats = pool.stats.take()
            await pool.close()
        return ids(first), ids(second), stats

    first, second, stats = asyncio.run(run())
    assert first == [0, 1, 2, 3, 4, 5, 6, 7]
    assert sorted(second) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert stats.failures == 0
    assert stats.breaker_openings >= 1


def test_a_half_open_endpoint_gets_one_request_until_that_is_answered() -> None:
    fake = FakeSGLang(503, 503, 503)
    fake.healthy = False

    async def test(pool: EndpointPool) -> tuple[int, int]:
        everything = asyncio.ensure_future(ask_all(pool, 10))
        await asyncio.sleep(0.3)
        while_unhealthy = len(fake.requests)
        fake.delay_s, fake.most_in_flight = 0.1, 0
        fake.healthy = True
        while len(fake.requests) == while_unhealthy:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        probing = fake.most_in_flight
        await everything
        return while_unhealthy, probing

    while_unhealthy, probing = with_pool([fake], test, concurrency=3)
    assert while_unhealthy == 3
    assert probing == 1
    assert fake.most_in_flight == 3
    assert fake.health_checks >= 3


def test_answers_delayed_past_the_deadline_end_in_time_with_the_reason() -> None:
    fake = FakeSGLang()
    fake.delay_s = 60.0

    async def test(pool: EndpointPool) -> tuple[list[Any], float]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        results = await asyncio.gather(*(pool.post("/generate", payload(n)) for n in range(4)), return_exceptions=True)
        return results, loop.time() - started

    results, seconds = with_pool([fake], test, deadline_s=0.4, concurrency=4)
    assert all(isinstance(error, HttpError) and error.reason == "timeout" and error.retryable for error in results)
    assert "no answer within 0.4 s in all" in str(results[0])
    assert seconds < 1.5  # all at once, not one after the other


def test_waiting_for_a_turn_at_a_server_that_works_costs_no_time() -> None:
    fake = FakeSGLang()
    fake.delay_s = 0.1

    async def test(pool: EndpointPool) -> Any:
        await ask_all(pool, 8)  # the last one waits 0.7 s
        return pool.stats.take()

    assert with_pool([fake], test, concurrency=1, deadline_s=0.5).queue_max == 7
    assert len(fake.requests) == 8


def test_one_slow_endpoint_of_three_is_hedged_and_then_left_with_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.serving.lateness.LEAST_SECONDS", 0.06)
    monkeypatch.setattr("opd.serving.lateness.POLL_SECONDS", 0.02)
    fakes = [FakeSGLang(), FakeSGLang(), FakeSGLang()]
    for fake, delay in zip(fakes, (0.02, 0.02, 2.0), strict=True):
        fake.delay_s = delay

    async def test(pool: EndpointPool) -> Any:
        for _ in range(6):  # as prompts do, in waves
            await ask_all(pool, 18)
        return pool.stats.take_each()

    total, each = with_pool(fakes, test)
    answered = [len(stats.latencies) for stats in each]
    assert sum(answered) == 108
    assert answered[2] == 0  # not one was waited for
    assert each[2].requests <= 18  # 6 of the first wave, and hardly any later; a third would be 36
    assert total.hedge_wins == each[2].requests
    assert abs(answered[0] - answered[1]) <= 20


def test_without_hedging_a_slow_endpoint_is_waited_for() -> None:
    fakes = [FakeSGLang(), FakeSGLang()]
    fakes[1].delay_s = 0.7

    async def test(pool: EndpointPool) -> Any:
        await ask_all(pool, 20)
        return pool.stats.take_each()

    total, each = with_pool(fakes, test, hedge_factor=0.0)
    assert total.hedges == 0
    assert len(each[1].latencies) == each[1].requests == 10


def test_a_wrong_request_is_not_asked_again_and_does_not_open_the_breaker() -> None:
    fakes = [FakeSGLang(*[400] * 20), FakeSGLang(*[400] * 20)]

    async def test(pool: EndpointPool) -> Any:
        results = await asyncio.gather(*(pool.post("/generate", payload(n)) for n in range(20)), return_exceptions=True)
        assert {error.status for error in results} == {400}
        return pool.stats.take()

    stats = with_pool(fakes, test)
    assert (stats.requests, stats.failures, stats.breaker_openings) == (20, 20, 0)


def test_whoever_gives_up_leaves_no_slot_taken() -> None:
    fake = FakeSGLang()
    fake.delay_s = 0.2

    async def test(pool: EndpointPool) -> int:
        asked = [asyncio.ensure_future(pool.post("/generate", payload(n))) for n in range(6)]
        await asyncio.sleep(0.05)
        for task in asked[:5]:  # two in flight, three in the queue
            task.cancel()
        await asked[5]
        return sum(task.cancelled() for task in asked)

    assert with_pool([fake], test, concurrency=2) == 5
    assert sorted(ids(fake)) == [0, 1, 5]


def test_requests_go_through_what_joins_them() -> None:
    seen = []

    def through(post: Any) -> Any:
        async def joined(path: str, body: dict[str, Any]) -> Any:
            seen.append(path)
            return await post(path, body)

        return joined

    async def run() -> None:
        async with FakeSGLang().running() as fake:
            pool = EndpointPool(addresses(fake.url), SETTINGS, through=through)
            await ask_all(pool, 3)
            await pool.close()

    asyncio.run(run())
    assert seen == ["/generate"] * 3
