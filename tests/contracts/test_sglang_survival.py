"""Real servers killed with SIGKILL, updated while they write, and behind sglang-router: no answer is lost.

The tests follow each other on the same two servers, because a start takes 10 s; the last one leaves a server dead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from opd.rollout.sglang_engine import SGLangEngine
from opd.serving.router import SGLangRouter
from opd.serving.server import SGLangServer
from opd.types import GenerationRequest, GenerationResult, SamplingParams
from tests.contracts.conftest import CONTEXT, OF_TORCHRUN, START_SECONDS, TinyModel

pytestmark = pytest.mark.contracts

PARAMS = SamplingParams(max_new_tokens=200)


def open_engine(*servers: SGLangServer, **options: Any) -> SGLangEngine:
    return SGLangEngine(
        servers, max_running_requests=32, max_context_len=CONTEXT, start_timeout_s=START_SECONDS, **options
    )


def close_engine(engine: SGLangEngine) -> None:
    engine._servers.clear()  # they are the session's
    engine.close()


def requests(prompts: list[list[int]], answers: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(key=answers * i + j, prompt_ids=tuple(prompt))
        for i, prompt in enumerate(prompts)
        for j in range(answers)
    ]


def kill(server: SGLangServer) -> None:
    psutil.Process(server.pid).kill()


def check_log_probs(
    result: GenerationResult, request: GenerationRequest, models: dict[int, TinyModel], *, tolerance: float = 1e-3
) -> None:
    """Every token's log-prob is that of the weights which its span names, given all tokens before it."""
    tokens = [*request.prompt_ids, *result.response_ids]
    ends = [start for start, _ in result.weight_spans[1:]] + [len(result.response_ids)]
    for (start, version), end in zip(result.weight_spans, ends, strict=True):
        expected = models[version].logprobs(tokens)[len(request.prompt_ids) - 1 :]
        assert result.log_probs[start:end] == pytest.approx(expected[start:end], abs=tolerance)


def test_requests_in_flight_during_an_update_name_both_weights(
    server: SGLangServer, tiny_a: TinyModel, tiny_b: TinyModel, random_ids: Any
) -> None:
    engine = open_engine(server)
    models = {1: tiny_a, 2: tiny_b}
    engine.set_weights(tiny_a.model.state_dict().items(), version=1)
    asked = requests([random_ids(20) for _ in range(2)], 3)
    results: list[GenerationResult] = []
    stream = engine.generate(asked, SamplingParams(max_new_tokens=300))
    reader = threading.Thread(target=lambda: results.extend(stream))
    reader.start()
    time.sleep(1.0)
    engine.set_weights(tiny_b.model.state_dict().items(), version=2)
    assert not results, "the update came too late for this test"
    reader.join()
    assert sorted(result.key for result in results) == list(range(6))
    for result in results:
        assert [version for _, version in result.weight_spans] == [1, 2]
        assert len(result.response_ids) == 300
        check_log_probs(result, asked[result.key], models)
    engine.set_weights(tiny_a.model.state_dict().items(), version=3)
    close_engine(engine)


def test_a_server_killed_while_it_writes(
    doomed_server: SGLangServer, tiny_a: TinyModel, tiny_b: TinyModel, random_ids: Any
) -> None:
    engine = open_engine(doomed_server)
    engine.set_weights(tiny_b.model.state_dict().items(), version=5)
    probe = random_ids(30)
    engine.verify(probe, tiny_b.logprobs(probe), tolerance=1e-4)
    asked = requests([random_ids(20) for _ in range(4)], 8)  # not all fit at once: some are finished before the kill
    stream = engine.generate(asked, PARAMS)
    results = [next(stream)]
    kill(doomed_server)
    results += stream
    assert sorted(result.key for result in results) == list(range(32))
    for result in results:
        assert result.weight_spans == [(0, 5)]
        check_log_probs(result, asked[result.key], {5: tiny_b})
    engine.verify(probe, tiny_b.logprobs(probe), tolerance=1e-4)
    assert doomed_server.log_path.read_bytes().count(b"---- started again ----") == 1
    close_engine(engine)


def test_broadcast_and_router_outlive_a_worker(
    server: SGLangServer,
    doomed_server: SGLangServer,
    tiny_a: TinyModel,
    tiny_b: TinyModel,
    random_ids: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It dies between two buckets, comes back, and dies again while it writes."""

    def deadly(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for i, item in enumerate(tensors):
            if i == 12:
                kill(doomed_server)
            yield item

    monkeypatch.setenv(*OF_TORCHRUN)
    monkeypatch.setattr("opd.serving.weight_push.BUCKET_BYTES", 100_000)
    urls = [server.url, doomed_server.url]
    router = SGLangRouter(urls, log_path=tmp_path / "router.log")
    router.wait_ready(urls, 60)
    engine = open_engine(server, doomed_server, router=router, broadcast_from=torch.device("cpu"))
    probe = random_ids(30)
    engine.set_weights(tiny_b.model.state_dict().items(), version=7)
    assert engine.verify(probe, tiny_b.logprobs(probe), tolerance=1e-4) < 1e-4

    engine.set_weights(deadly(tiny_a.model.state_dict().items()), version=8)
    assert engine.verify(probe, tiny_a.logprobs(probe), tolerance=1e-4) < 1e-4
    assert router.healthy_workers() == set(urls)

    workers = psutil.Process(doomed_server.pid).children(recursive=True)
    assert workers
    asked = requests([random_ids(20) for _ in range(8)], 4)
    stream = engine.generate(asked, PARAMS)
    results = [next(stream)]
    kill(doomed_server)
    results += stream
    assert sorted(result.key for result in results) == list(range(32))
    for result in results:
        assert result.weight_spans == [(0, 8)]
        check_log_probs(result, asked[result.key], {8: tiny_a})

    close_engine(engine)
    assert not router.alive()
    doomed_server.stop()  # while it was being started again
    assert not doomed_server.alive()
    assert not psutil.wait_procs(workers, timeout=10)[1]
