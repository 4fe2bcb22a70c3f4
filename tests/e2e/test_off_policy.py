"""Answers that the student did not write alone: a warm-up on a file, batches mixed with it, and speculative KD."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.runs import TASK, rows, run, run_and_repeat, tiny_flags

pytestmark = pytest.mark.e2e


def write_answers(folder: Path) -> Path:
    """Short answers, as the teacher never gives them, so that learning them shows."""
    problems = [json.loads(line) for line in (TASK / "train.jsonl").read_text().splitlines()[:40]]
    path = folder / "answers.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": p["prompt"], "response": f"# {p['label']}"}) + "\n" for p in problems)
    )
    return path


def test_an_interrupted_warm_up_goes_on_with_the_same_answers(tmp_path):
    folder = tmp_path / "run"
    saving = {"save": folder / "checkpoints", "load": folder / "checkpoints", "save_interval": 2}
    mixing = {"sft_data": write_answers(tmp_path), "sft_steps": 3, "opd_off_policy_fraction": 0.25, "lambda_sft": 2.0}
    table = run_and_repeat(tiny_flags(folder, num_rollout=5, lr=1e-3, **saving, **mixing), folder, step=2)
    assert [row["off_policy_share"] for row in table] == [1.0, 1.0, 1.0, 0.25, 0.25]
    assert ["reward_mean" in row for row in table] == [False, False, False, True, True]
    assert [row["time_rollout"] == 0 for row in table] == [True, True, True, False, False]
    losses = [row["sft_loss"] for row in table]
    assert losses[2] < 0.8 * losses[0]


def test_speculative_kd_writes_better_answers_than_the_student(tmp_path):
    speculative = {"rollout_engine": "speculative_kd", "skd_top_k": 1, "rollout_batch_size": 16, "use_tis": True}
    evaluation = {"eval_prompt_data": TASK / "eval.jsonl", "eval_interval": 2}
    run(tiny_flags(tmp_path / "run", num_rollout=2, **speculative, **evaluation), log=tmp_path / "run.log")
    before, first, last = rows(tmp_path / "run")
    assert 0.005 < first["teacher_replaced_share"] < 0.2
    assert first["reward_mean"] > before["eval_accuracy"] + 0.2  # evaluation is the student's alone, the rollout is not
    assert last["sync_error"] < 1e-3
    assert last["grad_norm"] > 0
