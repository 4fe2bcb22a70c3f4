"""Answers that a real server writes for one request, and its memory given away and taken back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from opd.errors import EngineError
from opd.rollout.sglang_engine import SGLangEngine
from opd.serving.server import SGLangServer
from opd.types import GenerationRequest, SampleStatus, SamplingParams
from tests.contracts.conftest import CONTEXT, TinyModel

pytestmark = pytest.mark.contracts


@pytest.fixture
def engine(server: SGLangServer) -> Iterator[SGLangEngine]:
    engine = SGLangEngine([server], max_running_requests=64, max_context_len=CONTEXT, shares_gpus=True)
    yield engine
    engine._servers.clear()  # the server is the session's
    engine.close()


def test_a_short_answer_comes_while_the_others_of_its_request_are_written(
    engine: SGLangEngine, tiny_a: TinyModel, random_ids: Any
) -> None:
    """The short one has room for three tokens."""
    short = GenerationRequest(key=9, prompt_ids=tuple(random_ids(CONTEXT - 3)))
    long = [GenerationRequest(key=k, prompt_ids=tuple(random_ids(20))) for k in range(3)]
    stream = engine.generate([*long, short], SamplingParams(temperature=1.0, max_new_tokens=400))
    first = next(stream)
    (place,) = engine._servers
    assert (first.key, len(first.response_ids), place.in_flight) == (9, 3, 3)
    others = {result.key: result for result in stream}
    assert place.client.stats.requests == 1
    assert sorted(others) == [0, 1, 2]
    for request in long:
        result = others[request.key]
        assert (len(result.response_ids), result.status) == (400, SampleStatus.TRUNCATED)
        expected = tiny_a.logprobs([*request.prompt_ids, *result.response_ids])[19:]
        assert result.log_probs == pytest.approx(expected, abs=1e-3)


def test_memory_is_given_away_and_comes_back_with_the_weights(
    engine: SGLangEngine, tiny_a: TinyModel, tiny_b: TinyModel, random_ids: Any
) -> None:
    """A CPU server does all that is asked but has no memory to give; one that is asked in another order dies."""
    probe = random_ids(40)
    for version, model in ((3, tiny_b), (4, tiny_a)):
        engine.release_memory()
        with pytest.raises(EngineError, match="set_weights comes before"):
            list(engine.generate([GenerationRequest(key=0, prompt_ids=(3, 4))], SamplingParams()))
        engine.set_weights(model.model.state_dict().items(), version=version)
        assert engine.verify(probe, model.logprobs(probe), tolerance=1e-4) < 1e-4
        (result,) = engine.generate(
            [GenerationRequest(key=0, prompt_ids=tuple(probe))], SamplingParams(max_new_tokens=8)
        )
        assert (result.weight_version, len(result.response_ids)) == (version, 8)
