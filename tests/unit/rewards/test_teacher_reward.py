"""A score that failed is asked for again when that may help, without the task's rule."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from opd.config.teachers import TeacherSpec
from opd.rewards.teacher_reward import TeacherReward
from opd.teachers.served_teachers import ServedTeachers
from opd.teachers.top_scores import TopRequest
from opd.types import Sample
from tests.unit.serving.fake_sglang import FakeSGLang, logprob_of

pytestmark = pytest.mark.unit

ARGS = SimpleNamespace(opd_teacher_retries=0, opd_teacher_deadline=10.0)


def ask(*faults: Any, several: bool = False) -> tuple[TeacherReward, Sample, dict[str, Any], list[int]]:
    """The reward function, a sample with its first reward, the second one, and how often the rule was asked."""
    asked: list[int] = []

    async def rule(args: Any, sample: Sample) -> float:
        asked.append(sample.index)
        return 7.0

    async def run() -> Any:
        async with FakeSGLang(*faults).running() as fake:
            specs = [TeacherSpec(name=name, location=fake.url) for name in ("a", "b")[: 1 + several]]
            reward = TeacherReward(task_reward=rule, teachers=ServedTeachers(specs=tuple(specs)))
            sample = Sample(index=3, group_index=0, prompt="", tokens=[5, 6, 7], response_length=1)
            sample.reward = await reward(ARGS, sample)
            return reward, sample, await reward.score_again(ARGS, sample), asked

    return asyncio.run(run())


@pytest.mark.parametrize("several", [False, True])
def test_a_teacher_that_was_away_is_asked_again(several: bool) -> None:
    reward, sample, again, asked = ask(500, several=several)
    assert reward.unscored(sample) and reward.may_be_scored(sample)
    assert again == {"task_reward": 7.0, "teacher_log_probs": [logprob_of(2, 7)], "teacher_error": None}
    assert asked == [3]


def test_an_answer_that_is_wrong_stays_wrong() -> None:
    reward, sample, _, _ = ask(400)
    assert reward.unscored(sample) and not reward.may_be_scored(sample)


def test_a_scored_sample_lacks_nothing() -> None:
    reward, sample, _, _ = ask()
    assert not reward.unscored(sample) and not reward.may_be_scored(sample)
    sample.reward = 0.0  # an aborted one
    assert not reward.unscored(sample)


def test_answers_without_the_students_likely_tokens_are_scored_all_the_same() -> None:
    async def run(sampled_only: bool) -> dict[str, Any]:
        async with FakeSGLang().running() as fake:
            top = TopRequest(count=2, support="student", vocab_size=100)
            teachers = ServedTeachers(specs=(TeacherSpec(name="a", location=fake.url),), top=top)
            reward = TeacherReward(task_reward=zero, teachers=teachers)
            sample = Sample(index=3, group_index=0, prompt="", tokens=[5, 6, 7], response_length=1)
            return await (reward.of_sampled_tokens() if sampled_only else reward)(ARGS, sample)

    async def zero(args: Any, sample: Sample) -> float:
        return 0.0

    assert asyncio.run(run(False))["teacher_error"].startswith("top: ")  # a loss over them would have nothing
    assert asyncio.run(run(True))["teacher_log_probs"] == [logprob_of(2, 7)]
