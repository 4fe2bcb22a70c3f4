"""The operations of a step: twice the parameters per token, to first order; and what they are divided by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd.config.flags import parse_flags
from opd.cost_account import CostAccount
from opd.types import Sample

TASK = Path(__file__).resolve().parents[2] / "examples" / "on_policy_distillation" / "tiny_task"


def sample(length: int, *, off_policy: bool = False) -> Sample:
    return Sample(
        index=0, group_index=0, prompt="", tokens=[1] * (20 + length), response_length=length, off_policy=off_policy
    )


def account() -> CostAccount:
    flags = ["--hf-checkpoint", str(TASK / "student"), "--use-opd", "--opd-type", "megatron"]
    return CostAccount(
        parse_flags([*flags, "--opd-teacher-load", str(TASK / "teacher"), "--n-samples-per-prompt", "2"])
    )


def test_parts_add_up_and_follow_the_lengths() -> None:
    times = {"time_rollout": 1.0, "time_train": 2.0, "time_teacher": 0.5}
    one = account().metrics([sample(30), sample(30)], times)
    two = account().metrics([sample(30)] * 4 + [sample(500, off_policy=True)], times)
    names = ["flops/rollout", "flops/student_log_probs", "flops/teacher", "flops/update"]
    assert [name for name in one if name.startswith("flops/")] == names
    for name in names:
        assert two[name] == pytest.approx(2 * one[name])
    # forward and twice that backward, and the logits a second time
    assert 3 * one["flops/student_log_probs"] <= one["flops/update"] <= 4 * one["flops/student_log_probs"]
    peak = 160e9 * torch.get_num_threads()
    trained = one["flops/student_log_probs"] + one["flops/update"]
    assert one["utilisation/train"] == pytest.approx(trained / (2.0 * peak))
    assert one["utilisation/teacher"] == pytest.approx(one["flops/teacher"] / (0.5 * peak))


def test_a_step_without_own_answers_has_no_account() -> None:
    assert account().metrics([sample(30, off_policy=True)], {"time_train": 1.0}) == {}
