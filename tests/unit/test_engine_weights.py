"""When a run asks its engine for the GPUs' memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from opd.config.schema import Config, LaunchFlags, RolloutFlags
from opd.engine_weights import release_engine_memory

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("colocate", "leader", "releases"), [(True, True, 1), (False, True, 0), (True, False, 0)])
def test_the_rank_with_the_engine_releases_its_memory_when_they_share_gpus(
    colocate: bool, leader: bool, releases: int
) -> None:
    asked: list[Any] = []
    engine = SimpleNamespace(release_memory=lambda: asked.append("release"))
    config = Config(launch=LaunchFlags(colocate=colocate), rollout=RolloutFlags(rollout_engine="sglang"))
    release_engine_memory(SimpleNamespace(config=config, rollout=SimpleNamespace(engine=engine) if leader else None))
    assert len(asked) == releases
