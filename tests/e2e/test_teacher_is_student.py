"""A teacher that is the student costs nothing: the reverse KL is zero token by token, at any rollout temperature."""

from __future__ import annotations

import json

import pytest

from tests.e2e.alternatives import check_alternatives
from tests.e2e.runs import TASK, rows, run, tiny_flags

pytestmark = pytest.mark.e2e


def penalties(folder) -> list[float]:
    lines = (folder / "samples" / "step_00001.jsonl").read_text().splitlines()
    return [value for line in lines for value in json.loads(line)["penalty"]]


def test_coloaded(tmp_path):
    run(
        tiny_flags(tmp_path / "run", opd_teacher_load=TASK / "student", rollout_temperature=0.8, num_rollout=1),
        log=tmp_path / "log",
    )
    (row,) = rows(tmp_path / "run")
    assert abs(row["opd_reverse_kl"]) < 1e-6
    assert max(map(abs, penalties(tmp_path / "run"))) < 1e-5
    assert row["unscored_share"] == 0
    saved = tmp_path / "run" / "samples" / "step_00001.jsonl"
    check_alternatives(saved, temperature=0.8, student_top=TASK / "student")  # at the temperature of the KL


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_on_an_sglang_server(tmp_path, student_as_teacher, temperature):
    """Megatron's and SGLang's log-probs agree within 1e-4 on every token, with slime's function paths named."""
    flags = tiny_flags(
        tmp_path / "run",
        opd_type="sglang",
        opd_teacher_load=None,
        rm_url=f"{student_as_teacher.url}/generate",
        custom_rm_path="opd.rewards.on_policy_distillation.reward_func",
        custom_reward_post_process_path="opd.rewards.on_policy_distillation.post_process_rewards",
        rollout_temperature=temperature,
        num_rollout=1,
        num_saved_samples=16,
    )
    run(flags, log=tmp_path / "log")
    (row,) = rows(tmp_path / "run")
    assert len(penalties(tmp_path / "run")) == row["tokens"] > 200
    assert max(map(abs, penalties(tmp_path / "run"))) < 1e-4
    assert abs(row["opd_reverse_kl"]) < 1e-5
    assert row["unscored_share"] == 0 and row["teacher_failures"] == 0
    assert 0 < row["reward_mean"] < 1  # the task reward is there beside the teacher
    saved = tmp_path / "run" / "samples" / "step_00001.jsonl"
    check_alternatives(saved, student_top=TASK / "student", teacher_top=TASK / "student")  # all at temperature 1


@pytest.mark.parametrize("support", ["teacher", "union"])
def test_likely_tokens_of_an_sglang_server(tmp_path, student_as_teacher, support):
    """The divergence from what the server says of its likely tokens, and of the student's, is zero too."""
    flags = tiny_flags(
        tmp_path / "run",
        opd_type="sglang",
        opd_teacher_load=None,
        rm_url=f"{student_as_teacher.url}/generate",
        distillation_type="gkd",
        distillation_top_k=6,
        distillation_support=support,
        lambda_rl=0.5,
        num_rollout=1,
    )
    run(flags, log=tmp_path / "log")
    (row,) = rows(tmp_path / "run")
    assert abs(row["distillation_divergence"]) < 1e-6
    assert row["top1_agreement"] > 0.999 and 0 < row["tail_mass"] < 0.05
    assert row["unscored_share"] == 0 and row["teacher_failures"] == 0
