"""Runs over a Ray cluster that they start themselves: the numbers of one process, and every end that a run can have."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.ray_runs import STEPS, RayRun, assert_same
from tests.e2e import runs
from tests.e2e.runs import tiny_flags

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ENDLESS = 1000
PPO = {"advantage_estimator": "ppo", "critic_lr": 1e-3}
GKD = {"distillation_type": "gkd"}


def test_data_parallel_with_a_critic_elsewhere_and_a_killed_rank(tmp_path: Path) -> None:
    alone, output = tmp_path / "alone", tmp_path / "ray"
    runs.run(tiny_flags(alone, num_rollout=STEPS, **PPO), log=tmp_path / "alone.log")
    layout = {"actor_num_gpus_per_node": 2, "critic_num_gpus_per_node": 1, "distributed_timeout_minutes": 2}
    with RayRun(tiny_flags(output, num_rollout=ENDLESS, **PPO, **layout), folder=output) as run:
        assert_same(run.wait_for_steps(STEPS), runs.rows(alone))
        run.rank(1).kill()
        assert run.wait() == 1
        assert run.rows()[0]["step"] == 1
        told = run.err.read_text()
        assert "error: training rank 1 on 127.0.0.1" in told and "was killed by SIGKILL" in told
        assert str(output / "ranks" / "actor_1.log") in told
        _assert_all_gone(run)


def test_tensor_parallel_and_a_run_that_is_asked_to_stop(tmp_path: Path) -> None:
    alone, output, saved = tmp_path / "alone", tmp_path / "ray", tmp_path / "saved"
    runs.run(tiny_flags(alone, num_rollout=STEPS, **GKD), log=tmp_path / "alone.log")
    layout = {"actor_num_gpus_per_node": 2, "tensor_model_parallel_size": 2, "save": saved}
    with RayRun(tiny_flags(output, num_rollout=ENDLESS, **GKD, **layout), folder=output) as run:
        assert_same(run.wait_for_steps(STEPS), runs.rows(alone))
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 0, run.printed()
        last = run.rows()[-1]["step"]
        assert (saved / "latest_checkpointed_iteration.txt").read_text() == str(last)
        lines = run.out.read_text().splitlines()
        assert [line.split("/")[0] for line in lines if line.startswith("step ")] == [
            f"step {step:>4}" for step in range(1, last + 1)
        ]
        assert "\x1b" not in run.out.read_text() and "pid=" not in run.out.read_text()
        assert "stopped by SIGTERM" in run.err.read_text()
        _assert_all_gone(run)


def _assert_all_gone(run: RayRun) -> None:
    deadline = time.monotonic() + 10
    while left := [process for process in run.living() if _is_ours(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _is_ours(process: psutil.Process) -> bool:
    try:
        return bool(process.cmdline())
    except psutil.NoSuchProcess:
        return False
