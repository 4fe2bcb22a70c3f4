"""Config -> task reward, the reward function of a training sample, its post-processing; served teachers among them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from opd.config.model_rules import student_facts
from opd.config.paths import load_function
from opd.config.schema import Config
from opd.config.teachers import teachers
from opd.interfaces import PostProcessFn, RewardFn, RolloutEngine
from opd.rollout.driver import keep_rewards
from opd.rollout.with_teacher import EngineWithTeacher
from opd.types import Sample


def reward_functions(config: Config) -> tuple[RewardFn, RewardFn, PostProcessFn]:
    """(task reward, reward of a training sample, its post-processing).

    With an SGLang teacher the pair of ``opd.rewards.on_policy_distillation`` scores with the teacher and carries the
    task reward along; functions named by the user take the task's side of it.
    """
    flags = config.reward
    custom = load_function(flags.custom_rm_path, flag="--custom-rm-path") if flags.custom_rm_path else None
    process: PostProcessFn = keep_rewards
    if flags.custom_reward_post_process_path:
        process = load_function(flags.custom_reward_post_process_path, flag="--custom-reward-post-process-path")
    if config.opd.opd_type != "sglang":
        task_reward = custom or _rule(config)
        return task_reward, task_reward, process

    from opd.rewards.on_policy_distillation import post_process_rewards, reward_func
    from opd.teachers.served_teachers import ServedTeachers

    task_reward = custom if custom not in (None, reward_func) else _rule(config)
    store_scores = (
        post_process_rewards
        if process in (keep_rewards, post_process_rewards)
        else _both(post_process_rewards, process)
    )
    served = ServedTeachers.of_config(config, vocab_size=student_facts(config).vocab_size)
    score = partial(reward_func, task_reward=_of_own_answers(task_reward), teachers=served)
    return task_reward, score, store_scores


def _rule(config: Config) -> RewardFn:
    if config.reward.rm_type is None:
        return _no_reward
    from opd.rewards.rules import rule_reward

    return rule_reward


def scoring_stats(config: Config, engine: RolloutEngine) -> Callable[[], dict[str, float]]:
    """What takes the rollout's numbers about teachers, by the names of their metrics."""
    sources: list[tuple[str, Callable[[], dict[str, float]]]] = []
    if isinstance(engine, EngineWithTeacher):
        sources.append((engine.stats_prefix, engine.take_stats))
    if config.opd.opd_type == "sglang":
        from opd.rewards.on_policy_distillation import take_teacher_stats

        sources.append(("teacher_", take_teacher_stats))
    return lambda: {prefix + name: value for prefix, take in sources for name, value in take().items()}


def _of_own_answers(task_reward: RewardFn) -> RewardFn:
    """0 for an answer of --sft-data: it is shown to the teacher alone, and its row need not have a label."""

    async def reward(args: Any, sample: Sample, **kwargs: Any) -> float | dict[str, Any]:
        return 0.0 if sample.off_policy else await task_reward(args, sample, **kwargs)

    return reward


async def _no_reward(args: Any, sample: Sample, **_: Any) -> float:
    """Pure distillation without a task reward."""
    return 0.0


def _both(first: PostProcessFn, second: PostProcessFn) -> PostProcessFn:
    def process(args: Any, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]:
        first(args, samples, **kwargs)  # leaves the task reward in sample.reward
        return second(args, samples, **kwargs)

    return process


def check_served_teachers(config: Config, tokenizer: Any) -> None:
    from opd.background_loop import BackgroundLoop
    from opd.teachers.selftest import check_teacher

    key_variable = config.opd.opd_teacher_api_key_env
    by_address = {spec.location: spec for spec in reversed(teachers(config))}  # names that share one: the first
    loop = BackgroundLoop("teacher self-test")
    try:
        for address, spec in by_address.items():
            loop.run(
                check_teacher(
                    address,
                    tokenizer,
                    student_folder=config.checkpoint.hf_checkpoint,
                    api_key=os.environ.get(key_variable) if key_variable else None,
                    timeout_s=config.opd.opd_teacher_timeout,
                    shown=spec.shown,
                )
            )
    finally:
        loop.close()
