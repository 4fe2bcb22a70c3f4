"""The first rank alone writes, is answered by servers and rewards; what goes wrong there must reach the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.launch import launch
from tests.e2e.runs import rows, tiny_flags
from tests.tiny_models import write_tiny_model

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


def test_a_reward_that_fails_in_the_third_step_costs_no_step(tmp_path: Path) -> None:
    """All ranks save the second one together, and end; a run with a working reward goes on from there."""
    saved, output = tmp_path / "saved", tmp_path / "run"
    layout = {"actor_num_gpus_per_node": 2, "tensor_model_parallel_size": 2}
    flags = {"num_rollout": 3, "save": saved, "save_interval": 50, **layout}
    failing = tiny_flags(output, **flags, rm_type=None, custom_rm_path="tests.dist.failing.failing_reward")
    assert launch("tests.dist.failing:train", ranks=2, arguments={"flags": failing}, timeout_s=150) == [1, 1]
    assert (saved / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    again = tiny_flags(output, **flags, load=saved)
    assert launch("tests.dist.failing:train", ranks=2, arguments={"flags": again}, timeout_s=150) == [0, 0]
    assert [row["step"] for row in rows(output)] == [1, 2, 3]


def test_an_engine_that_refuses_the_weights_stops_all_ranks(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "qwen3", tied=True)
    told = launch("tests.dist.failing:sync", ranks=2, arguments={"folder": str(tmp_path)}, timeout_s=90)
    assert [name for name, _, _ in told] == ["EngineError", "FirstRankError"]
    assert all(message == "the server has no memory left" and together for _, message, together in told)


def test_a_save_folder_that_machines_do_not_share_is_refused_at_the_start(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    arguments = {"folders": [str(one), str(other)]}
    told = launch("tests.dist.failing:look_at", ranks=2, arguments=arguments)
    assert told[0].startswith(f"`--save={one}` is not one folder for all ranks: rank 1: on ")
    assert told[1].endswith("Give one that all machines share.")
    arguments = {"folders": [str(one), str(one)]}
    assert launch("tests.dist.failing:look_at", ranks=2, arguments=arguments) == ["", ""]
    assert list(one.iterdir()) == []


def test_ranks_wait_for_a_rollout_longer_than_for_any_collective() -> None:
    arguments = {"seconds": 12.0}  # other collectives give up after nine
    assert launch("tests.dist.failing:wait", ranks=2, arguments=arguments) == ["an answer"] * 2
