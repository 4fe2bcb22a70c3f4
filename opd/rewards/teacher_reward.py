"""The reward of a sample under a served teacher, or one that is a function: the task's rule, the teacher's scores, and
asking for them again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from opd.interfaces import RewardFn
from opd.rewards.on_policy_distillation import ask_teacher, reward_func
from opd.teachers.served_teachers import ScoringTeacher, ServedTeachers


@dataclass(frozen=True, kw_only=True)
class TeacherReward:
    """A ``RewardFn`` and a ``ScoredAgain``: ``reward_func`` with its task rule and teachers bound."""

    task_reward: RewardFn
    teachers: ScoringTeacher

    async def __call__(self, args: Any, sample: Any, **kwargs: Any) -> dict[str, Any]:
        return await reward_func(args, sample, task_reward=self.task_reward, teachers=self.teachers, **kwargs)

    def unscored(self, sample: Any) -> bool:
        return isinstance(sample.reward, dict) and sample.reward.get("teacher_error") is not None

    def may_be_scored(self, sample: Any) -> bool:
        return self.unscored(sample) and sample.reward.get("teacher_unavailable", False)

    async def score_again(self, args: Any, sample: Any) -> dict[str, Any]:
        return {"task_reward": sample.reward["task_reward"], **await ask_teacher(args, sample, self.teachers)}

    def of_sampled_tokens(self) -> TeacherReward:
        """Without likely tokens: only a loss needs them, and of the student's a rollout engine tells those of training
        samples alone."""
        served = isinstance(self.teachers, ServedTeachers)
        return replace(self, teachers=replace(self.teachers, top=None)) if served else self
