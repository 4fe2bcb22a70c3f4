"""Which samples of a step come from --sft-data, where they stand in the batch, and what is counted of them."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from opd.build_rewards import _of_own_answers
from opd.config.off_policy_rules import off_policy_prompts
from opd.config.schema import Config, DistillationFlags, OffPolicyFlags, OpdFlags, RolloutFlags
from opd.data.prompts import Prompt
from opd.rollout.driver import RolloutDriver, RolloutResult, keep_rewards
from opd.rollout.mixing import NOTHING, mix, unscored
from opd.rollout.plan import RolloutPlanner, RolloutWriter
from opd.run_state import RunState
from opd.step import make_training_batch
from opd.step_metrics import batch_metrics, rollout_metrics
from opd.types import Sample, SampleStatus


def make_config(prompts: int = 4, per_prompt: int = 2, **off_policy) -> Config:
    return Config(
        rollout=RolloutFlags(rollout_batch_size=prompts, n_samples_per_prompt=per_prompt, num_rollout=9),
        off_policy=OffPolicyFlags(**{"sft_data": "answers.jsonl", **off_policy}),
    )


def sample(index: int, *, off_policy: bool = False, reward: float | None = None) -> Sample:
    return Sample(
        index=index,
        group_index=-1 - index if off_policy else index // 2,
        prompt="",
        tokens=[1, 2, 3],
        response_length=2,
        rollout_log_probs=[0.0, 0.0] if off_policy else [-1.0, -1.5],
        status=SampleStatus.COMPLETED,
        reward=reward,
        off_policy=off_policy,
    )


def own(count: int) -> RolloutResult:
    rewards = [float(i % 2) for i in range(count)]
    return RolloutResult(
        samples=[sample(i, reward=r) for i, r in enumerate(rewards)],
        rewards=rewards,
        seconds_generation=2.0,
        seconds_scoring_tail=1.0,
        scoring={"teacher_requests": 3.0},
    )


def answers(count: int) -> RolloutResult:
    return unscored([sample(100 + i, off_policy=True) for i in range(count)])


@pytest.mark.parametrize(
    ("flags", "by_step"),
    [
        ({"sft_data": None}, [0, 0, 0]),
        ({"sft_steps": 2}, [4, 4, 0]),
        ({"opd_off_policy_fraction": 0.25}, [1, 1, 1]),
        ({"opd_off_policy_fraction": 0.4}, [2, 2, 2]),  # 1.6 prompts: the nearest whole number
        ({"sft_steps": 1, "opd_off_policy_fraction": 0.5}, [4, 2, 2]),
    ],
)
def test_prompts_of_a_step_that_come_from_the_file(flags, by_step):
    assert [off_policy_prompts(make_config(**flags), step) for step in (1, 2, 3)] == by_step


@pytest.mark.parametrize(("of_student", "of_file"), [(4, 4), (6, 2), (2, 6), (5, 1), (7, 3), (0, 4)])
def test_every_optimizer_step_gets_its_share_of_the_answers(of_student, of_file):
    mixed = mix(own(of_student) if of_student else NOTHING, answers(of_file))
    marks = [s.off_policy for s in mixed.samples]
    half = len(marks) // 2
    assert sum(marks) == of_file
    assert abs(sum(marks[:half]) - sum(marks[half:])) <= 1 + len(marks) % 2
    for off_policy in (False, True):  # nobody is overtaken
        indices = [s.index for s in mixed.samples if s.off_policy is off_policy]
        assert indices == sorted(indices)
    for s, reward in zip(mixed.samples, mixed.rewards, strict=True):
        assert reward == (0.0 if s.off_policy else s.reward)


def test_answers_of_others_do_not_move_the_advantages():
    mixed = mix(own(6), answers(2))
    batch = make_training_batch(mixed, make_config())
    alone = make_training_batch(own(6), make_config())
    torch.testing.assert_close(batch.outcome_advantages_N[~batch.off_policy_N], alone.outcome_advantages_N)
    assert batch.outcome_advantages_N[batch.off_policy_N].tolist() == [0.0, 0.0]
    warm_up = make_training_batch(mix(NOTHING, answers(3)), make_config())
    assert warm_up.outcome_advantages_N.tolist() == [0.0, 0.0, 0.0]


class Driver:
    """Writes answers like the student, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked, self.scored = [], []

    def write(self, groups, *, leaving, params, advance):
        assert leaving == len(groups)
        self.asked.append(([group.prompt.index for group in groups], groups[0].samples[0].index))
        return own(sum(len(group.samples) for group in groups)), []

    def score(self, samples):
        self.scored += samples
        return unscored(samples)


class Cursor:
    """Prompts or answers, numbered as they are taken."""

    def __init__(self) -> None:
        self.position = 0

    def take(self, n):
        self.position += n
        return [Prompt(index=i, text="", ids=(1,)) for i in range(self.position - n, self.position)]

    def take_samples(self, n, first_index):
        self.take(n)
        return [sample(first_index + i, off_policy=True) for i in range(n)]

    def state(self):
        return {"position": self.position}


class Progress:
    def __enter__(self):
        return SimpleNamespace(advance=lambda tokens: None)

    def __exit__(self, *_):
        return None


def make_parts(config: Config, *, leader: bool = True) -> SimpleNamespace:
    console = SimpleNamespace(rollout=lambda count: Progress())
    return SimpleNamespace(
        config=config,
        prompts=Cursor(),
        answers=Cursor(),
        rollout=Driver() if leader else None,
        reporter=SimpleNamespace(console=console),
        train_sampling=None,
        journal=None,
    )


def generate(parts: SimpleNamespace, *steps: int) -> list[RolloutResult | None]:
    planner, writer = RolloutPlanner(parts, RunState()), RolloutWriter(parts, RunState())
    return [writer(planner(step)) for step in steps]


def test_a_warm_up_step_uses_no_engine_and_a_later_one_mixes():
    config = make_config(sft_steps=1, opd_off_policy_fraction=0.25)
    parts = make_parts(config)
    first, second = generate(parts, 1, 2)
    assert [s.index for s in first.samples] == list(range(8))
    assert all(s.off_policy for s in first.samples)
    assert parts.rollout.asked == [([0, 1, 2], 8)]
    assert [s.index for s in second.samples if s.off_policy] == [14, 15]  # after the student's 8 ... 13
    assert (len(second.samples), parts.rollout.scored) == (8, [])


def test_all_ranks_move_the_cursors_alike():
    config = make_config(sft_steps=1, opd_off_policy_fraction=0.25)
    leader, other = make_parts(config), make_parts(config, leader=False)
    generate(leader, 1, 2)
    assert generate(other, 1, 2) == [None, None]
    assert (leader.prompts.position, leader.answers.position) == (3, 10)
    assert (other.prompts.position, other.answers.position) == (3, 10)


def test_a_teacher_server_scores_the_answers_for_a_distillation_loss_only():
    for distillation, scored in ((DistillationFlags(), 0), (DistillationFlags(distillation_type="gkd"), 8)):
        teacher = OpdFlags(use_opd=True, opd_type="sglang")
        config = replace(make_config(sft_steps=1), distillation=distillation, opd=teacher)
        parts = make_parts(config)
        generate(parts, 1)
        assert len(parts.rollout.scored) == scored


def test_written_answers_are_scored_without_an_engine():
    async def reward(args, sample):
        return float(sample.index)

    driver = RolloutDriver(None, reward=reward, post_process=keep_rewards, args=None, decode=str)
    try:
        assert driver.score([sample(5, off_policy=True), sample(7, off_policy=True)]).rewards == [5.0, 7.0]
    finally:
        driver.close()


def test_the_tasks_rule_does_not_judge_answers_of_others():
    async def needs_a_label(args, sample):
        raise AssertionError("asked")

    rule = _of_own_answers(needs_a_label)
    assert asyncio.run(rule(None, sample(0, off_policy=True))) == 0.0
    with pytest.raises(AssertionError, match="asked"):
        asyncio.run(rule(None, sample(0)))


class Ranks:
    def sum_over_ranks(self, sums, maxima):
        return {**sums, **maxima}


def metrics_of(mixed: RolloutResult, distillation_type: str | None = None) -> dict[str, float]:
    """The teacher has scored the student's own answers alone."""
    config = replace(
        make_config(),
        opd=OpdFlags(use_opd=True, opd_type="megatron"),
        distillation=DistillationFlags(distillation_type=distillation_type),
    )
    batch = make_training_batch(mixed, config)
    scored_N = ~batch.off_policy_N
    batch = batch.with_(
        student_logprobs_T=batch.rollout_logprobs_T - 0.25 - 5.0 * batch.off_policy_N.repeat_interleave(2),
        student_entropy_T=torch.ones(len(batch.loss_mask_T)),
        teacher_scored_N=scored_N,
        reverse_kl_T=torch.where(scored_N, 0.5, 9.0).repeat_interleave(2),
    )
    return batch_metrics(batch, Ranks(), config=config)


def test_metrics_are_of_the_students_own_answers():
    mixed = mix(own(6), answers(2))
    metrics = metrics_of(mixed)
    assert (metrics["tokens"], metrics["logprob_mismatch_mean"], metrics["logprob_mismatch_max"]) == (16, 0.25, 0.25)
    assert (metrics["opd_reverse_kl"], metrics["unscored_share"]) == (0.5, 0.0)
    assert metrics_of(mixed, "gkd")["unscored_share"] == 0.25  # a distillation loss needs the others scored too
    rollout = rollout_metrics(mixed)
    assert (rollout["reward_mean"], rollout["off_policy_share"], rollout["teacher_requests"]) == (0.5, 0.25, 3.0)


def test_a_warm_up_step_reports_no_number_of_answers_there_are_not():
    warm_up = mix(NOTHING, answers(4))
    assert rollout_metrics(warm_up) == {"samples": 4, "off_policy_share": 1.0}
    assert metrics_of(warm_up) == {"tokens": 8}
    assert metrics_of(warm_up, "gkd") == {"tokens": 8, "unscored_share": 1.0}


def test_run_state_keeps_both_cursors_and_reads_older_checkpoints():
    state = SimpleNamespace(state=lambda: {"epoch": 1})
    after = RunState(step=3).after_step(state, state)
    assert RunState.from_json(after.to_json()) == RunState(step=4, prompts={"epoch": 1}, answers={"epoch": 1})
    assert RunState(step=3).after_step(state, None).answers is None
    assert RunState.from_json({"step": 2, "prompts": None}) == RunState(step=2)
