"""The numbers of a teacher with several addresses: all together, and each one's by its place in the flag."""

from __future__ import annotations

import asyncio
import weakref
from types import SimpleNamespace

import pytest

from opd.rewards import on_policy_distillation
from opd.rewards.on_policy_distillation import reward_func, take_teacher_stats
from tests.unit.serving.fake_sglang import FakeSGLang

pytestmark = pytest.mark.unit


def test_every_address_has_its_own_numbers_beside_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FakeSGLang(), FakeSGLang(500)
    monkeypatch.setattr(on_policy_distillation, "_clients", weakref.WeakKeyDictionary())  # none of other tests'

    async def run() -> dict[str, float]:
        async with first.running(), second.running():
            args = SimpleNamespace(
                rm_url=f"{first.url}/generate,{second.url}/generate",
                opd_teacher_batch=1,  # or one request may hold all rows, and one address get nothing
                opd_teacher_concurrency=2,
                opd_teacher_hedge=0,
            )
            samples = [SimpleNamespace(tokens=[5, 6, 7, n], response_length=2, label="") for n in range(8)]
            await asyncio.gather(*(reward_func(args, sample) for sample in samples))
            return take_teacher_stats()

    stats = asyncio.run(run())
    assert stats["endpoint_1/requests"] == len(first.requests) > 0
    assert stats["endpoint_2/requests"] == len(second.requests) > 0
    assert (stats["endpoint_1/errors"], stats["endpoint_2/errors"]) == (0, 1)
    for name in ("requests", "errors", "bytes", "retries"):
        assert stats[name] == stats[f"endpoint_1/{name}"] + stats[f"endpoint_2/{name}"], name
    assert stats["requests"] == 9  # eight samples, and the one that was sent again
    slowest = max(stats["endpoint_1/latency_p99"], stats["endpoint_2/latency_p99"])
    assert stats["latency_p99"] == slowest
    assert "queue_max" in stats and "endpoint_1/queue_max" not in stats  # all addresses share one queue
