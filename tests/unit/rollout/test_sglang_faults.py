"""Servers of the rollout engine die, lie and lag: no answer is lost, and none comes from other weights than it says."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from opd.errors import EngineError, WeightSyncError
from opd.rollout.sglang_engine import SGLangEngine
from opd.types import GenerationRequest, SamplingParams
from tests.unit.rollout.fake_engine import FIRST_W, FakeEngineServer

pytestmark = pytest.mark.unit

PARAMS = SamplingParams(max_new_tokens=20)
SCORED = [7, 8, 9]


@pytest.fixture
def start() -> Iterator[Callable[..., SGLangEngine]]:
    engines: list[SGLangEngine] = []

    def start(*servers: FakeEngineServer, limit: int = 64, **options: Any) -> SGLangEngine:
        engines.append(SGLangEngine(servers, max_running_requests=limit, max_context_len=1000, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def requests(prompts: int, answers: int) -> list[GenerationRequest]:
    return [GenerationRequest(key=k, prompt_ids=(3, 4, k // answers)) for k in range(prompts * answers)]


def weights(w: float) -> list[tuple[str, torch.Tensor]]:
    return [("w", torch.tensor(w))]


def killed_after_the_first(engine: SGLangEngine, server: FakeEngineServer, asked: list[GenerationRequest]) -> list:
    stream = engine.generate(asked, PARAMS)
    results = [next(stream)]
    server.kill()
    return results + list(stream)


def test_a_server_killed_while_it_writes_comes_back_with_the_pushed_weights(start: Callable[..., SGLangEngine]) -> None:
    server = FakeEngineServer()
    engine = start(server, limit=4)
    engine.set_weights(weights(2.0), version=6)
    results = killed_after_the_first(engine, server, requests(6, 2))
    assert sorted(result.key for result in results) == list(range(12))
    assert server.lives == 2
    assert {p for result in results for p in result.log_probs} == {-2.0}
    assert {result.weight_version for result in results} == {6}
    assert all(result.weight_spans == [(0, 6)] for result in results)


def test_before_the_first_push_a_restarted_server_needs_none(start: Callable[..., SGLangEngine]) -> None:
    server = FakeEngineServer()
    engine = start(server)
    results = killed_after_the_first(engine, server, requests(2, 2))
    assert [result.log_probs[0] for result in results] == [-FIRST_W] * 4
    assert server.count("/begin_weight_update") == 0


def test_the_other_server_takes_over_while_one_starts_again(start: Callable[..., SGLangEngine]) -> None:
    first, second = FakeEngineServer(1, token_seconds=0.02, start_seconds=60.0), FakeEngineServer(2)
    engine = start(first, second)
    results = killed_after_the_first(engine, first, requests(4, 3))
    assert len(results) == 12
    assert {result.response_ids[0] for result in results} == {2}
    assert first.count("/generate") == 6  # two prompts were there and had to move


def test_restarts_are_limited(start: Callable[..., SGLangEngine]) -> None:
    server = FakeEngineServer(die_on="/generate")
    engine = start(server, max_restarts=1)
    assert len(list(engine.generate(requests(1, 2), PARAMS))) == 2
    server.die_on = "/generate"
    with pytest.raises(EngineError, match=r"(?s)has ended.*the last line.*--sglang-max-restarts=1"):
        list(engine.generate(requests(1, 2), PARAMS))


@pytest.mark.parametrize(
    "path", ["/pause_generation", "/begin_weight_update", "/update_weights_from_tensor", "/continue_generation"]
)
def test_a_death_during_an_update_ends_with_all_servers_alike(start: Callable[..., SGLangEngine], path: str) -> None:
    dying, other = FakeEngineServer(1), FakeEngineServer(2)
    engine = start(dying, other)
    engine.set_weights(weights(2.0), version=1)
    dying.die_on = path
    engine.set_weights(weights(3.0), version=2)
    assert [(server.version, server.w, server.paused) for server in (dying, other)] == [("2", 3.0, False)] * 2
    assert other.count("/update_weights_from_tensor") == 2  # it got each version once
    assert (dying.lives, other.lives) == (2, 1)


def test_a_death_while_scoring_the_probe_is_mended(start: Callable[..., SGLangEngine]) -> None:
    server = FakeEngineServer(die_on="/generate")
    engine = start(server)
    engine.set_weights(weights(2.0), version=1)
    assert engine.verify(SCORED, [-2.0, -2.0], tolerance=1e-3) < 1e-6
    assert server.lives == 2


def test_a_restarted_server_must_pass_the_probe(start: Callable[..., SGLangEngine]) -> None:
    server = FakeEngineServer(broken_restart=True)
    engine = start(server)
    engine.set_weights(weights(2.0), version=1)
    engine.verify(SCORED, [-2.0, -2.0], tolerance=1e-3)
    server.kill()
    with pytest.raises(WeightSyncError, match="off by 1 nats"):
        list(engine.generate(requests(1, 1), PARAMS))


def test_without_restarts_no_copy_is_kept_and_death_is_the_end(start: Callable[..., SGLangEngine]) -> None:
    server = FakeEngineServer()
    engine = start(server, max_restarts=0)
    engine.set_weights(weights(2.0), version=1)
    assert engine._weights._sync._copy is None
    server.kill()
    with pytest.raises(WeightSyncError, match="has ended"):
        engine.set_weights(weights(3.0), version=2)


def test_an_update_that_breaks_off_leaves_nothing_to_restart_with(start: Callable[..., SGLangEngine]) -> None:
    def breaks_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights(3.0)
        raise ArithmeticError

    server = FakeEngineServer()
    engine = start(server)
    engine.set_weights(weights(2.0), version=1)
    with pytest.raises(ArithmeticError):
        engine.set_weights(breaks_off(), version=2)
    server.kill()
    with pytest.raises(EngineError, match="no whole set of weights"):
        list(engine.generate(requests(1, 1), PARAMS))


def test_answers_from_weights_that_nobody_gave_are_refused(start: Callable[..., SGLangEngine]) -> None:
    server = FakeEngineServer()
    engine = start(server)
    engine.set_weights(weights(2.0), version=1)
    server.version = "default"
    with pytest.raises(EngineError, match="calls `default`, and was given version 1"):
        list(engine.generate(requests(1, 1), PARAMS))
    with pytest.raises(WeightSyncError, match="version tampered after an update to 2"):
        _with_foreign_pusher(engine, server)


def _with_foreign_pusher(engine: SGLangEngine, server: FakeEngineServer) -> None:
    act = server._act

    async def tampering(path: str, body: dict[str, Any]) -> Any:
        answer = await act(path, body)
        if path == "/continue_generation":
            server.version = "tampered"
        return answer

    server._act = tampering
    engine.set_weights(weights(3.0), version=2)


def test_answers_to_a_prompt_stay_together_and_prompts_are_spread(start: Callable[..., SGLangEngine]) -> None:
    engine = start(FakeEngineServer(1), FakeEngineServer(2))
    homes: dict[int, set[int]] = defaultdict(set)
    for result in engine.generate(requests(6, 4), PARAMS):
        homes[result.key // 4].add(result.response_ids[0])
    assert all(len(servers) == 1 for servers in homes.values())
    assert Counter(servers.pop() for servers in homes.values()) == {1: 3, 2: 3}


def test_the_first_answer_to_a_long_prompt_goes_ahead_until_the_prompt_is_computed(
    start: Callable[..., SGLangEngine],
) -> None:
    """A short prompt's answers, and what one answer alone is wanted to, go in one request."""
    server = FakeEngineServer(token_seconds=0.01)
    engine = start(server)
    long, short, alone = tuple(range(64)), (3, 4), tuple(range(70))
    asked = [GenerationRequest(key=k, prompt_ids=p) for k, p in enumerate([long] * 4 + [short] * 4 + [alone])]
    assert len(list(engine.generate(asked, PARAMS))) == 9
    assert server.lists == [(1 + 4 + 1, 0), (3, 0)]  # the first one's siblings do not wait for its end


def test_a_slow_server_gets_fewer_prompts(start: Callable[..., SGLangEngine]) -> None:
    engine = start(FakeEngineServer(1), FakeEngineServer(2, token_seconds=0.02), limit=2)
    written = Counter(result.response_ids[0] for result in engine.generate(requests(12, 2), PARAMS))
    assert written[1] >= 2 * written[2] > 0


def test_requests_wait_for_an_update_and_go_on_with_the_new_weights(start: Callable[..., SGLangEngine]) -> None:
    server = FakeEngineServer(token_seconds=0.01)
    engine = start(server)
    engine.set_weights(weights(2.0), version=1)
    stream = engine.generate(requests(1, 3), SamplingParams(max_new_tokens=60))
    first: list[Any] = []
    reader = threading.Thread(target=lambda: first.extend(stream))
    reader.start()
    while server.count("/generate") < 3:
        reader.join(0.02)
    reader.join(0.1)
    engine.set_weights(weights(3.0), version=2)
    reader.join()
    for result in first:
        (start_1, version_1), (start_2, version_2) = result.weight_spans
        assert (start_1, version_1, version_2) == (0, 1, 2)
        assert result.log_probs == [-2.0] * start_2 + [-3.0] * (60 - start_2)
        assert result.weight_version == 2
    assert len(first) == 3
