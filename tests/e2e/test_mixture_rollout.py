"""Training on answers that student and teacher write together, from teacher-heavy to the student alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.runs import run_and_repeat, tiny_flags

pytestmark = pytest.mark.e2e


def flags(folder: Path) -> list[str]:
    checkpoints = folder / "checkpoints"
    mixture = {
        "rollout_engine": "mixture",
        "mixture_alpha_scale": [2, 0],
        "mixture_schedule_steps": 4,
        "mixture_draft_tokens": 3,  # without it the draft lengths follow measured times, and two runs differ
        "use_tis": True,
        "rollout_batch_size": 16,
    }
    return tiny_flags(folder, num_rollout=4, save=checkpoints, load=checkpoints, save_interval=2, **mixture)


def test_the_schedule_goes_on_after_a_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    table = run_and_repeat(flags(folder), folder, step=2)
    assert [row["mixture_scale"] for row in table] == pytest.approx([2, 4 / 3, 2 / 3, 0])
    weights = [row["mixture_alpha_mean"] for row in table[:3]]
    assert weights[0] > 0.75 and weights[0] > weights[1] > weights[2] > 0.2
    rewards = [row["reward_mean"] for row in table]
    assert rewards[0] > 0.85  # nearly the teacher
    assert rewards[0] > rewards[2] + 0.1 > rewards[3] + 0.2  # the student after three steps is far from it
    assert table[0]["mixture_kl_to_teacher"] < 0.5 * table[0]["mixture_kl_to_student"]
    assert table[2]["mixture_kl_to_teacher"] > 2 * table[2]["mixture_kl_to_student"]
    assert all(0 < row["mixture_accepted_share"] <= 1 < row["mixture_tokens_per_round"] <= 3 for row in table[:3])
    assert table[3]["importance_ratio_mean"] == pytest.approx(1, abs=1e-4)  # the student's own answers
    assert "mixture_alpha_mean" not in table[3]
    assert all(row["sync_error"] < 1e-3 < row["grad_norm"] for row in table)
