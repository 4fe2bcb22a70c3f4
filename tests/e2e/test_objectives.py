"""Whole runs of what has a state of its own: a critic, a moving-average teacher, adapters; and of several teachers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.runs import TASK, rows, run, run_and_repeat, tiny_flags

pytestmark = pytest.mark.e2e


def run_and_resume(folder: Path, **changes) -> list[dict]:
    """Rows of a run of 4 steps, after checking that its second half, run again from step 2, gives the same."""
    checkpoints = folder / "checkpoints"
    saving = {"save": checkpoints, "load": checkpoints, "save_interval": 2, "num_rollout": 4}
    return run_and_repeat(tiny_flags(folder, **saving, **({"lr": 1e-3} | changes)), folder, step=2)


def test_ppo_resumes_with_its_critic_and_its_reference(tmp_path):
    table = run_and_resume(
        tmp_path / "run",
        advantage_estimator="ppo",
        normalize_advantages=True,
        kl_coef=0.05,
        use_kl_loss=True,
        kl_loss_coef=0.01,
        entropy_coef=0.001,
        global_batch_size=8,
        critic_lr=3e-3,
        num_critic_only_steps=1,
    )
    assert [row["grad_norm"] > 0 for row in table] == [False, True, True, True]
    assert all(row["critic_grad_norm"] > 0 for row in table)
    assert abs(table[-1]["value_mean"]) > 0.05
    assert "kl_loss" not in table[0] and table[-1]["kl_loss"] > 0


def test_adapters_learn_from_their_own_average_shown_the_answer(tmp_path):
    table = run_and_resume(
        tmp_path / "run",
        opd_teacher_load=None,
        opd_teacher_self="ema",
        opd_teacher_ema_decay=0.5,
        opd_teacher_prompt_template="Answer: {label}. {prompt}",
        distillation_type="gkd",
        distillation_top_k=8,
        distillation_support="student",
        lora_rank=4,
        global_batch_size=8,
    )
    assert all(row["distillation_divergence"] > 1e-4 and row["grad_norm"] > 0 for row in table)
    assert all(0 < row["tail_mass"] < 0.5 and 0.2 < row["top1_agreement"] <= 1 for row in table)

    peft = tmp_path / "run" / "checkpoints" / "peft"
    settings = json.loads((peft / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["base_model_name_or_path"].endswith("student")
    adapters = load_file(peft / "adapter_model.safetensors")
    assert any(torch.count_nonzero(tensor) for name, tensor in adapters.items() if "lora_B" in name)


def test_each_teacher_scores_its_own_samples(tmp_path):
    data = tmp_path / "routed.jsonl"
    problems = [json.loads(line) for line in (TASK / "train.jsonl").read_text().splitlines()[:40]]
    routed = [p | {"metadata": {"teacher": "times" if "bags" in p["prompt"] else "plus"}} for p in problems]
    data.write_text("".join(json.dumps(row) + "\n" for row in routed))
    teachers = {
        "prompt_data": data,
        "opd_teacher_load": None,
        "opd_teachers": [f"times={TASK / 'student'}", f"plus={TASK / 'teacher'}"],
        "opd_teacher_kl_coefs": ["times=0.5"],
    }
    losses = {"distillation_type": "reverse_kl", "lambda_rl": 0.3, "num_rollout": 1}
    run(tiny_flags(tmp_path / "run", **teachers, **losses), log=tmp_path / "run.log")
    (row,) = rows(tmp_path / "run")
    assert row["teacher/times/reverse_kl"] == pytest.approx(0, abs=1e-5)  # the student's own weights
    assert row["teacher/plus/reverse_kl"] > 0.05
    assert row["distillation_loss"] > 0 and row["policy_loss"] != 0
