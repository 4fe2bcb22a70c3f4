"""The rollout engine against a real SGLang server: what it writes, its log-probs, and its weights."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from opd.data.prompts import Prompt
from opd.errors import EngineError, WeightSyncError
from opd.rollout.partial import continue_with, new_sample, request_for
from opd.rollout.sglang_engine import SGLangEngine
from opd.serving.command import ServerOptions
from opd.serving.server import SGLangServer
from opd.types import GenerationRequest, SampleStatus, SamplingParams
from tests.contracts.conftest import CONTEXT, START_SECONDS, TinyModel

pytestmark = pytest.mark.contracts

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=24)


@pytest.fixture(scope="module")
def engine(server: SGLangServer) -> Iterator[SGLangEngine]:
    engine = SGLangEngine([server], max_running_requests=64, max_context_len=CONTEXT)
    yield engine
    engine._servers.clear()  # the server is the session's
    engine.close()


@pytest.fixture
def restored(engine: SGLangEngine, tiny_a: TinyModel) -> Iterator[None]:
    yield
    engine.set_weights(tiny_a.model.state_dict().items(), version=0)


def _requests(prompts: list[list[int]]) -> list[GenerationRequest]:
    return [GenerationRequest(key=100 + i, prompt_ids=tuple(prompt)) for i, prompt in enumerate(prompts)]


def test_greedy_answers_equal_transformers(engine: SGLangEngine, tiny_a: TinyModel, random_ids: Any) -> None:
    prompts = [random_ids(n) for n in (1, 5, 24, 130)]
    results = {r.key: r for r in engine.generate(_requests(prompts), GREEDY)}
    for request in _requests(prompts):
        ids = torch.tensor([request.prompt_ids])
        expected = tiny_a.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, do_sample=False
        )
        result = results[request.key]
        # Without stop ids nothing but the limit ends an answer; transformers masks the end-of-text token to get there.
        if 0 not in result.response_ids:
            assert result.response_ids == expected[0, ids.shape[1] :].tolist()
        assert len(result.response_ids) == 24
        assert result.status is SampleStatus.TRUNCATED


def test_sampled_log_probs_are_those_of_the_tempered_distribution(
    engine: SGLangEngine, tiny_a: TinyModel, random_ids: Any
) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95, max_new_tokens=32)
    prompts = [random_ids(24) for _ in range(4)] * 4
    results = list(engine.generate(_requests(prompts), params))
    assert sorted(r.key for r in results) == [r.key for r in _requests(prompts)]
    prompt_of = {r.key: list(r.prompt_ids) for r in _requests(prompts)}
    for result in results:
        tokens = prompt_of[result.key] + result.response_ids
        expected = tiny_a.logprobs(tokens, temperature=0.8)[23:]
        assert result.log_probs == pytest.approx(expected, abs=1e-3)
    assert len({tuple(r.response_ids) for r in results}) == len(results)


def test_the_likeliest_tokens_are_reported_on_request(engine: SGLangEngine, tiny_a: TinyModel, random_ids: Any) -> None:
    params = SamplingParams(temperature=0.8, max_new_tokens=12, top_ids=5)
    prompt = random_ids(24)
    (result,) = engine.generate(_requests([prompt]), params)
    likely_TV = tiny_a.all_logprobs(prompt + result.response_ids)[len(prompt) - 1 : -1]
    assert result.top_ids.equal(likely_TV.topk(5).indices.int())
    (plain,) = engine.generate(_requests([prompt]), GREEDY)
    assert plain.top_ids is None


def test_a_stop_token_ends_the_answer_and_belongs_to_it(engine: SGLangEngine, random_ids: Any) -> None:
    prompt = random_ids(12)
    (free,) = engine.generate(_requests([prompt]), GREEDY)
    stop = free.response_ids[3]
    params = SamplingParams(temperature=0.0, max_new_tokens=24, stop_token_ids=(stop,))
    (stopped,) = engine.generate(_requests([prompt]), params)
    first = free.response_ids.index(stop)
    assert stopped.response_ids == free.response_ids[: first + 1]
    assert len(stopped.log_probs) == first + 1
    assert stopped.status is SampleStatus.COMPLETED


def test_an_answer_is_set_aside_and_continued_by_other_weights(
    engine: SGLangEngine, tiny_a: TinyModel, tiny_b: TinyModel, restored: None, random_ids: Any
) -> None:
    """Pieces by the same weights are the whole; other weights go on from what the first ones wrote."""
    params = replace(GREEDY, pause_after=10)
    prompt = Prompt(index=1, text="", ids=tuple(random_ids(24)))
    (whole,) = engine.generate(_requests([list(prompt.ids)]), GREEDY)
    sample = new_sample(prompt, 100)
    for length, status in ((10, SampleStatus.PENDING), (20, SampleStatus.PENDING), (24, SampleStatus.TRUNCATED)):
        (piece,) = engine.generate([request_for(prompt, sample)], params)
        continue_with(sample, piece)
        assert (sample.response_ids, sample.status) == (whole.response_ids[:length], status)
    assert sample.rollout_log_probs == pytest.approx(whole.log_probs, abs=1e-3)

    sample = new_sample(prompt, 100)
    continue_with(sample, next(iter(engine.generate([request_for(prompt, sample)], params))))
    engine.set_weights(tiny_b.model.state_dict().items(), version=3)
    (piece,) = engine.generate([request_for(prompt, sample)], params)
    continue_with(sample, piece)
    assert sample.weight_spans == [(0, 0), (10, 3)]
    assert sample.rollout_log_probs[:10] == pytest.approx(whole.log_probs[:10], abs=1e-3)
    assert sample.rollout_log_probs[10:] == pytest.approx(tiny_b.logprobs(sample.tokens)[33:], abs=1e-3)


def test_an_answer_may_fill_the_context(engine: SGLangEngine, random_ids: Any) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=100)
    (result,) = engine.generate(_requests([random_ids(CONTEXT - 3)]), params)
    assert len(result.response_ids) == 3
    with pytest.raises(ValueError, match="leaves no room"):
        list(engine.generate(_requests([random_ids(CONTEXT)]), params))


def test_a_caller_may_stop_listening(engine: SGLangEngine, random_ids: Any) -> None:
    stream = engine.generate(_requests([random_ids(8) for _ in range(8)]), SamplingParams(max_new_tokens=200))
    next(stream)
    stream.close()
    assert len(list(engine.generate(_requests([random_ids(8)]), GREEDY))) == 1


def test_weights_through_memory(
    engine: SGLangEngine, tiny_a: TinyModel, tiny_b: TinyModel, random_ids: Any, restored: None
) -> None:
    probe = random_ids(60)
    assert engine.verify(probe, tiny_a.logprobs(probe), tolerance=1e-4) < 1e-4
    engine.set_weights(tiny_b.model.state_dict().items(), version=7)
    assert engine.verify(probe, tiny_b.logprobs(probe), tolerance=1e-4) < 1e-4
    with pytest.raises(WeightSyncError, match="max-logprob-mismatch"):
        engine.verify(probe, tiny_a.logprobs(probe), tolerance=0.1)
    (result,) = engine.generate(_requests([probe]), GREEDY)
    assert result.weight_version == 7
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"


def test_weights_in_several_buckets(
    engine: SGLangEngine, tiny_b: TinyModel, random_ids: Any, restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd.serving.weight_push.BUCKET_BYTES", 100_000)
    probe = random_ids(30)
    engine.set_weights(((n, t.detach()) for n, t in tiny_b.model.state_dict().items()), version=8)
    assert engine.verify(probe, tiny_b.logprobs(probe), tolerance=1e-4) < 1e-4


def test_a_missing_tensor_is_noticed(engine: SGLangEngine, tiny_b: TinyModel, random_ids: Any, restored: None) -> None:
    state = tiny_b.model.state_dict()
    state.pop("model.layers.1.mlp.down_proj.weight")
    engine.set_weights(state.items(), version=9)
    probe = random_ids(30)
    with pytest.raises(WeightSyncError):
        engine.verify(probe, tiny_b.logprobs(probe), tolerance=0.1)


def test_weights_through_a_folder(
    server: SGLangServer, tiny_a: TinyModel, tiny_b: TinyModel, random_ids: Any, tmp_path: Path, restored: None
) -> None:
    remote = SGLangEngine(
        [server.url], max_running_requests=4, max_context_len=CONTEXT, sync_folder=tmp_path, model_folder=tiny_a.folder
    )
    probe = random_ids(60)
    remote.set_weights(tiny_b.model.state_dict().items(), version=11)
    remote.verify(probe, tiny_b.logprobs(probe), tolerance=1e-4)
    (result,) = remote.generate(_requests([probe]), GREEDY)
    assert result.weight_version == 11
    assert list(tmp_path.iterdir()) == []
    remote.close()
    assert server.alive()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    options = ServerOptions(model_path="somewhere", extra_args=("--no-such-flag",))
    with SGLangServer(options, log_path=tmp_path / "server.log") as broken:
        with pytest.raises(EngineError, match=r"somewhere.*ended with status(?s:.*)arguments: --no-such-flag"):
            broken.wait_ready(START_SECONDS)
        assert not broken.alive()


_PARENT = """
import sys, time
from opd.serving.command import ServerOptions
from opd.serving.server import SGLangServer
server = SGLangServer(ServerOptions(model_path=sys.argv[1]), log_path=sys.argv[2])
print(server.pid, flush=True)
time.sleep(600)
"""


def test_killing_the_parent_ends_the_server(tiny_a: TinyModel, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PARENT, str(tiny_a.folder), str(tmp_path / "server.log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    orphan = psutil.Process(int(parent.stdout.readline()))
    time.sleep(1.0)  # the watch starts before SGLang is imported
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
