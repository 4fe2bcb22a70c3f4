"""Servers on the trainer's GPUs: what they are asked, in which order, around a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from opd.config.schema import Config, LaunchFlags, RolloutFlags
from opd.errors import EngineError
from opd.rollout.sglang_engine import SGLangEngine
from opd.rollout.sglang_start import start_servers
from opd.serving.hosts import ThisMachine
from opd.types import GenerationRequest, SamplingParams
from tests.unit.rollout.fake_engine import FakeEngineServer

pytestmark = pytest.mark.unit

REQUESTS = [GenerationRequest(key=0, prompt_ids=(3, 4))]
PARAMS = SamplingParams(max_new_tokens=5)
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


@pytest.fixture
def start() -> Iterator[Callable[..., SGLangEngine]]:
    engines: list[SGLangEngine] = []

    def start(*servers: FakeEngineServer, shares_gpus: bool = True) -> SGLangEngine:
        engines.append(SGLangEngine(servers, max_running_requests=8, max_context_len=100, shares_gpus=shares_gpus))
        engines[-1].set_weights(weights(2.0), version=1)
        for server in servers:
            server.asked.clear()
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def weights(w: float) -> list[tuple[str, torch.Tensor]]:
    return [("w", torch.tensor(w))]


def asked(server: FakeEngineServer) -> list[Any]:
    """Paths; of what is about memory also which."""
    return [(path, body["tags"]) if "memory" in path else path for path, body in server.asked]


def test_memory_comes_back_around_the_new_weights(start: Callable[..., SGLangEngine]) -> None:
    server = FakeEngineServer()
    engine = start(server)
    engine.release_memory()
    assert asked(server) == ["/pause_generation", (RELEASE, ["weights", "kv_cache", "cuda_graph"])]
    with pytest.raises(EngineError, match="set_weights comes before an answer"):
        list(engine.generate(REQUESTS, PARAMS))
    server.asked.clear()
    engine.set_weights(weights(3.0), version=2)
    assert asked(server) == [
        "/pause_generation",
        (RESUME, ["weights"]),
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/end_weight_update",
        (RESUME, ["kv_cache", "cuda_graph"]),
        "/continue_generation",
        "/model_info",
    ]
    (result,) = engine.generate(REQUESTS, PARAMS)
    assert result.log_probs == [-3.0] * 5
    engine.set_weights(weights(4.0), version=3)  # for an evaluation: nothing was released in between
    assert sum(path == RESUME for path, _ in server.asked) == 2


def test_a_server_that_dies_meanwhile_comes_back_with_its_memory(start: Callable[..., SGLangEngine]) -> None:
    dying, other = FakeEngineServer(1), FakeEngineServer(2)
    engine = start(dying, other)
    engine.release_memory()
    dying.kill()
    engine.set_weights(weights(3.0), version=2)
    assert dying.count(RESUME) == 0  # a fresh one has all of it
    assert other.count(RESUME) == 2
    assert [(server.version, server.w, server.paused) for server in (dying, other)] == [("2", 3.0, False)] * 2


def test_servers_with_gpus_of_their_own_keep_their_memory(start: Callable[..., SGLangEngine]) -> None:
    server = FakeEngineServer()
    engine = start(server, shares_gpus=False)
    engine.release_memory()
    assert asked(server) == []
    assert len(list(engine.generate(REQUESTS, PARAMS))) == 1


@pytest.mark.parametrize(
    ("colocate", "ahead", "engine", "released"),
    [
        (True, False, "sglang", True),
        (False, False, "sglang", False),
        (True, True, "sglang", False),  # it writes while the trainer trains
        (True, False, "torch", False),
    ],
)
def test_when_a_run_releases_memory(colocate: bool, ahead: bool, engine: str, released: bool) -> None:
    rollout = RolloutFlags(rollout_engine=engine, async_rollout=ahead)
    assert Config(launch=LaunchFlags(colocate=colocate), rollout=rollout).releases_engine_memory is released


def test_gpus_cannot_be_shared_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a server is started."""
    monkeypatch.setattr("opd.serving.memory_occupation.PACKAGE", "no_such_memory_saver")
    config = Config(launch=LaunchFlags(colocate=True), rollout=RolloutFlags(rollout_engine="sglang"))
    with pytest.raises(EngineError, match=r"`--colocate` on GPUs needs .*`pip install torch-memory-saver`"):
        start_servers(config, dtype=torch.bfloat16, device=torch.device("cuda"), max_context_len=9, host=ThisMachine())
