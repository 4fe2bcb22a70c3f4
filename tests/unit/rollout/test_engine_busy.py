"""The seconds in which each rollout server had a request."""

from __future__ import annotations

import time

import pytest

from opd.rollout.sglang_engine import SGLangEngine
from opd.types import GenerationRequest, SamplingParams
from tests.unit.rollout.fake_engine import FakeEngineServer

pytestmark = pytest.mark.unit


def test_they_lie_within_the_rollout_and_are_taken_once() -> None:
    engine = SGLangEngine([FakeEngineServer(), FakeEngineServer()], max_running_requests=4, max_context_len=1000)
    try:
        asked = [GenerationRequest(key=k, prompt_ids=(3, 4, k // 2)) for k in range(16)]
        started = time.monotonic()
        list(engine.generate(asked, SamplingParams(max_new_tokens=20)))
        seconds = time.monotonic() - started
        stats = engine.take_stats()
        assert set(stats) == {"1/busy_seconds", "2/busy_seconds"}
        assert all(0 < value <= seconds for value in stats.values())
        assert engine.take_stats() == {}
    finally:
        engine.close()
