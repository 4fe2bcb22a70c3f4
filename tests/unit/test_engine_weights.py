"""When a run asks its engine for the GPUs' memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd.config.schema import Config, LaunchFlags, RolloutFlags
from opd.engine_weights import release_engine_memory, sync_weights
from opd.errors import UpdateError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("colocate", "leader", "releases"), [(True, True, 1), (False, True, 0), (True, False, 0)])
def test_the_rank_with_the_engine_releases_its_memory_when_they_share_gpus(
    colocate: bool, leader: bool, releases: int
) -> None:
    asked: list[Any] = []
    engine = SimpleNamespace(release_memory=lambda: asked.append("release"))
    config = Config(launch=LaunchFlags(colocate=colocate), rollout=RolloutFlags(rollout_engine="sglang"))
    rollout = SimpleNamespace(engine=engine) if leader else None
    trainer = SimpleNamespace(from_first_rank=lambda value: value)
    release_engine_memory(SimpleNamespace(config=config, trainer=trainer, rollout=rollout))
    assert len(asked) == releases


def test_a_student_that_has_no_log_probs_is_no_fault_of_the_engine() -> None:
    trainer = SimpleNamespace(
        export_weights=lambda: iter(()),
        score=lambda probe: torch.tensor([-1.0, torch.nan]),
        from_first_rank=lambda value: value,
    )
    probe = SimpleNamespace(tokens=torch.zeros(1, 2))
    parts = SimpleNamespace(config=Config(), trainer=trainer, rollout=None, probe=probe)
    with pytest.raises(UpdateError, match="its weights hold NaN"):
        sync_weights(parts, version=1)
