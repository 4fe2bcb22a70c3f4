"""The engine behind a real ``sglang-router``, over servers that only pretend to write."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from opd.errors import EngineError
from opd.rollout.sglang_engine import SGLangEngine
from opd.serving.router import SGLangRouter
from opd.types import GenerationRequest, SamplingParams
from tests.unit.rollout.fake_engine import FakeEngineServer

pytest.importorskip("sglang_router")
pytestmark = pytest.mark.unit

PARAMS = SamplingParams(max_new_tokens=20)


@pytest.fixture
def servers() -> list[FakeEngineServer]:
    """The engine stops them."""
    return [FakeEngineServer(1), FakeEngineServer(2)]


@pytest.fixture
def engine(servers: list[FakeEngineServer], tmp_path: Path) -> Iterator[SGLangEngine]:
    urls = [server.url for server in servers]
    router = SGLangRouter(urls, log_path=tmp_path / "router.log")
    router.wait_ready(urls, 30)
    engine = SGLangEngine(servers, max_running_requests=32, max_context_len=500, router=router, max_restarts=1)
    engine.set_weights([("w", torch.tensor(2.0))], version=1)
    yield engine
    engine.close()


def requests(prompts: int, answers: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(key=k, prompt_ids=tuple(range(100 * (k // answers), 100 * (k // answers) + 60)))
        for k in range(prompts * answers)
    ]


def test_answers_come_through_the_router_and_weights_do_not(
    engine: SGLangEngine, servers: list[FakeEngineServer]
) -> None:
    results = list(engine.generate(requests(4, 4), PARAMS))
    assert [result.log_probs for result in results] == [[-2.0] * 20] * 16
    assert sum(server.count("/generate") for server in servers) == 16
    assert [server.client.stats.requests for server in engine._servers] == [6, 6]  # the update's; no answer's
    assert [server.count("/update_weights_from_tensor") for server in servers] == [1, 1]


def test_a_dead_worker_is_off_the_list_until_it_holds_the_weights(
    engine: SGLangEngine, servers: list[FakeEngineServer]
) -> None:
    servers[0].start_seconds = 0.5
    stream = engine.generate(requests(8, 4), PARAMS)
    results = [next(stream)]
    servers[0].kill()
    results += stream
    assert sorted(result.key for result in results) == list(range(32))
    assert {p for result in results for p in result.log_probs} == {-2.0}  # none from the weights of a fresh start
    engine.set_weights([("w", torch.tensor(3.0))], version=2)
    assert [(server.version, server.lives) for server in servers] == [("2", 2), ("2", 1)]
    assert engine._router.healthy_workers() == {server.url for server in servers}


def test_a_dead_router_is_started_again_once(engine: SGLangEngine) -> None:
    slow = SamplingParams(max_new_tokens=200)
    stream = engine.generate(requests(2, 4), slow)
    time.sleep(0.1)
    os.killpg(engine._router.pid, signal.SIGKILL)
    assert sorted(result.key for result in stream) == list(range(8))
    os.killpg(engine._router.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"(?s)sglang-router at .* has ended.*end of its log"):
        list(engine.generate(requests(2, 4), PARAMS))


def test_closing_ends_the_router_and_its_wrapper(engine: SGLangEngine) -> None:
    family = [psutil.Process(engine._router.pid)]
    family += family[0].children(recursive=True)
    assert len(family) == 2
    engine.close()
    assert not psutil.wait_procs(family, timeout=5)[1]
