"""slime's reward, post-processing and advantage hooks, on objects with slime's fields."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd.errors import UserError
from opd.plugins.slime import compute_advantages, post_process_rewards, reward_func
from tests.unit.plugins.slime_objects import Sample, slime_args
from tests.unit.serving.fake_sglang import FakeSGLang, logprob_of

pytestmark = pytest.mark.unit

TOKENS = [11, 12, 13, 14, 15]


def sample(response: str = "# 23", *, group: int = 0, length: int = 3, **fields: Any) -> Sample:
    return Sample(
        group_index=group, tokens=list(TOKENS), response_length=length, response=response, label="23", **fields
    )


def scores(length: int = 3) -> list[float]:
    return [logprob_of(i, TOKENS[i]) for i in range(len(TOKENS) - length, len(TOKENS))]


def asked(samples: Any, *faults: Any, **changes: Any) -> Any:
    """What slime gets from the reward hook for one sample, or for the list of a group."""

    async def run() -> Any:
        async with FakeSGLang(*faults).running() as fake:
            args = slime_args(rm_url=f"{fake.url}/generate", opd_teacher_retries=0, **changes)
            return await reward_func(args, samples)

    return asyncio.run(run())


def test_importing_the_hooks_loads_nothing_heavy() -> None:
    heavy = ("torch", "megatron", "ray", "sglang", "aiohttp", "slime")
    code = f"import sys, opd.plugins.slime; print([name for name in {heavy} if name in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3]
    )
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_the_teachers_scores_and_the_tasks_reward_come_together() -> None:
    reward = asked(sample(), rm_type="final_answer")
    assert reward == {"task_reward": 1.0, "teacher_log_probs": scores(), "teacher_error": None}
    assert asked(sample(), rm_type="final_answer", reward_key="score")["score"] == 1.0
    assert [one["task_reward"] for one in asked([sample(), sample("# 7")], rm_type="final_answer")] == [1.0, 0.0]


def test_a_samples_own_rule_comes_before_the_runs() -> None:
    assert asked(sample(metadata={"rm_type": "exact"}), rm_type="final_answer")["task_reward"] == 0.0


def test_a_task_reward_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_slime_rm.py").write_text("async def rm(args, sample):\n    return {'acc': 0.5, 'len': 3}\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"opd_task_rm_path": "my_slime_rm.rm"}
    assert asked(sample(), reward_key="acc", **mine)["task_reward"] == 0.5
    assert asked(sample(), reward_key="len", **mine)["len"] == 3.0
    with pytest.raises(UserError, match="fields acc, len, and `--reward-key` names none"):
        asked(sample(), **mine)


def test_slime_finds_the_tasks_reward_under_its_key_before_and_after() -> None:
    args = slime_args(reward_key="task_reward")
    samples = rewarded(1.0, 0.0)
    assert [one.get_reward_value(args) for one in samples] == [1.0, 0.0]
    post_process_rewards(args, samples)
    assert [one.get_reward_value(args) for one in samples] == [1.0, 0.0]


def test_a_rule_that_only_slime_has_needs_slime() -> None:
    with pytest.raises(UserError, match="`--rm-type=deepscaler` is a rule of slime, which cannot be imported"):
        asked(sample(), rm_type="deepscaler")


def rewarded(*tasks: float) -> list[Sample]:
    """Two per group, as slime's manager passes them on."""
    return [
        sample(group=i // 2, reward={"task_reward": task, "teacher_log_probs": scores(), "teacher_error": None})
        for i, task in enumerate(tasks)
    ]


def test_rewards_become_relative_to_the_group_as_slime_makes_them() -> None:
    raw, relative = post_process_rewards(slime_args(), rewarded(1.0, 0.0, 1.0, 1.0))
    assert raw == [1.0, 0.0, 1.0, 1.0]
    deviation = 0.5**0.5 + 1e-6  # of (1, 0), with n - 1
    assert relative == pytest.approx([0.5 / deviation, -0.5 / deviation, 0.0, 0.0], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"grpo_std_normalization": False}, [0.5, -0.5]),
        ({"advantage_estimator": "reinforce_plus_plus_baseline"}, [0.5, -0.5]),
        ({"rewards_normalization": False}, [1.0, 0.0]),
        ({"advantage_estimator": "ppo"}, [1.0, 0.0]),
    ],
)
def test_other_estimators_get_what_slime_gives_them(changes: dict[str, Any], expected: list[float]) -> None:
    assert post_process_rewards(slime_args(**changes), rewarded(1.0, 0.0))[1] == pytest.approx(expected)


def test_groups_without_numbers_go_by_their_places() -> None:
    samples = rewarded(1.0, 0.0, 4.0, 2.0)
    for one in samples:
        one.group_index = None
    relative = post_process_rewards(slime_args(grpo_std_normalization=False), samples)[1]
    assert relative == pytest.approx([0.5, -0.5, 1.0, -1.0])


def test_scores_move_to_the_sample_and_an_unscored_one_leaves_the_loss() -> None:
    samples = rewarded(1.0, 0.0)
    samples[1].reward["teacher_log_probs"], samples[1].reward["teacher_error"] = None, "timeout: ..."
    args = slime_args(reward_key="score")
    post_process_rewards(args, samples)
    assert samples[0].teacher_log_probs.tolist() == pytest.approx(scores())
    assert [one.remove_sample for one in samples] == [False, True]
    assert samples[1].teacher_log_probs.tolist() == [0.0, 0.0, 0.0]
    assert [one.get_reward_value(args) for one in samples] == [1.0, 0.0]


def rollout_data(lengths: tuple[int, ...] = (3, 2)) -> dict[str, Any]:
    """As slime's trainer holds it: lists with a tensor per sample; the last token of the first is masked."""
    generator = torch.Generator().manual_seed(0)
    student = [-torch.rand(n, generator=generator) for n in lengths]
    teacher = [-torch.rand(n, generator=generator) for n in lengths]
    masks = [torch.ones(n, dtype=torch.int) for n in lengths]
    masks[0][-1] = 0
    return {
        "response_lengths": list(lengths),
        "rewards": [0.7, -0.7],
        "log_probs": student,
        "rollout_log_probs": [row - 1 for row in student],
        "teacher_log_probs": teacher,
        "loss_masks": masks,
    }


def test_the_penalty_is_subtracted_from_each_token_that_counts() -> None:
    data = rollout_data()
    compute_advantages(slime_args(opd_kl_coef=2.0), data)
    for i, reward in enumerate(data["rewards"]):
        counts = data["loss_masks"][i]
        kl = (data["log_probs"][i] - data["teacher_log_probs"][i]) * counts
        torch.testing.assert_close(data["opd_reverse_kl"][i], kl)
        torch.testing.assert_close(data["advantages"][i], reward - 2.0 * kl)
        torch.testing.assert_close(data["returns"][i], torch.full_like(kl, reward))


def test_clip_discount_and_the_engines_own_logprobs() -> None:
    data = rollout_data()
    compute_advantages(slime_args(use_rollout_logprobs=True, opd_kl_clip=0.5, opd_kl_discount=1.0), data)
    kl = (data["rollout_log_probs"][1] - data["teacher_log_probs"][1]).clamp(-0.5, 0.5)
    torch.testing.assert_close(data["advantages"][1], -0.7 - torch.stack([kl.sum(), kl[1]]))


def test_whitening_leaves_the_coefficient_alone() -> None:
    plain, whitened = rollout_data(), rollout_data()
    compute_advantages(slime_args(opd_kl_coef=0.0, opd_normalize_advantages=True), plain)
    compute_advantages(slime_args(opd_kl_coef=3.0, opd_normalize_advantages=True), whitened)
    base, counts = torch.cat(plain["advantages"]), torch.cat(plain["loss_masks"]) != 0
    assert float(base[counts].mean()) == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(torch.cat(whitened["advantages"]), base - 3.0 * torch.cat(whitened["opd_reverse_kl"]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_opd": True}, "would subtract the penalty twice"),
        ({"normalize_advantages": True}, "divide its coefficient out"),
        ({"advantage_estimator": "ppo"}, "`--advantage-estimator=ppo` is not served"),
        ({"context_parallel_size": 2}, "needs whole answers on a rank"),
        ({"rollout_temperature": 0.7}, "the teacher server's at 1 whatever it is asked"),
    ],
)
def test_flags_that_would_learn_something_else_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        compute_advantages(slime_args(**changes), rollout_data())


def test_a_batch_without_a_side_of_the_kl_is_refused() -> None:
    data = rollout_data() | {"teacher_log_probs": None}
    with pytest.raises(UserError, match="carry no teacher_log_probs"):
        compute_advantages(slime_args(), data)
    del data["log_probs"]  # slime's own saving of a forward pass
    with pytest.raises(UserError, match="no log_probs: .* Add --get-mismatch-metrics"):
        compute_advantages(slime_args(), data)


def test_the_same_paths_work_in_our_own_trainer() -> None:
    from opd.config.paths import split_path

    ours = ("opd.rewards.on_policy_distillation", "reward_func")
    assert split_path("opd.plugins.slime.reward_func", flag="--custom-rm-path") == ours
    assert split_path("slime.rollout.on_policy_distillation.reward_func", flag="--custom-rm-path") == ours


def test_a_score_of_the_wrong_length_is_no_score() -> None:
    one = SimpleNamespace(**vars(rewarded(1.0)[0]))
    one.reward["teacher_log_probs"] = scores()[:2]
    post_process_rewards(slime_args(), [one])
    assert one.remove_sample
