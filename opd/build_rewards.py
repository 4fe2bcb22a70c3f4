"""Config -> task reward, the reward function of a training sample, its post-processing; served teachers among them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opd.config.flags import flag_text
from opd.config.model_rules import student_facts
from opd.config.paths import load_function
from opd.config.schema import Config
from opd.config.teachers import TeacherSpec, teachers
from opd.data.tokenizer import load_tokenizer
from opd.errors import TeacherError
from opd.interfaces import EngineWithStats, PostProcessFn, RewardFn, RolloutEngine
from opd.rollout.driver import keep_rewards
from opd.rollout.score_wait import ScoreWait
from opd.serving.addresses import addresses
from opd.types import Sample

if TYPE_CHECKING:
    from opd.data.prompts import Prompt
    from opd.teachers.cross_tokenizer import CrossTokenizer
    from opd.teachers.function_teacher import FunctionTeacher


def reward_functions(
    config: Config, text: CrossTokenizer | None = None, function: FunctionTeacher | None = None
) -> tuple[RewardFn, RewardFn, PostProcessFn]:
    """(task reward, reward of a training sample, its post-processing).

    Args:
        text: of a served teacher with another tokenizer.
        function: the teacher with ``--opd-type custom``.

    With an SGLang or custom teacher the pair of ``opd.rewards.on_policy_distillation`` scores with the teacher and
    carries the task reward along; functions named by the user take the task's side of it.
    """
    flags = config.reward
    custom = load_function(flags.custom_rm_path, flag="--custom-rm-path") if flags.custom_rm_path else None
    process: PostProcessFn = keep_rewards
    if flags.custom_reward_post_process_path:
        process = load_function(flags.custom_reward_post_process_path, flag="--custom-reward-post-process-path")
    if not config.scores_answers:
        task_reward = custom or _rule(config)
        return task_reward, task_reward, process

    from opd.rewards.on_policy_distillation import post_process_rewards, reward_func
    from opd.rewards.teacher_reward import TeacherReward
    from opd.teachers.served_teachers import ServedTeachers

    task_reward = custom if custom not in (None, reward_func) else _rule(config)
    store_scores = (
        post_process_rewards
        if process in (keep_rewards, post_process_rewards)
        else _both(post_process_rewards, process)
    )
    teachers = function or ServedTeachers.of_config(config, vocab_size=student_facts(config).vocab_size, text=text)
    score = TeacherReward(task_reward=_of_own_answers(task_reward), teachers=teachers)
    return task_reward, score, store_scores


def _rule(config: Config) -> RewardFn:
    if config.reward.rm_type is None:
        return _no_reward
    from opd.rewards.rules import rule_reward

    return rule_reward


def scoring_stats(
    config: Config, engine: RolloutEngine, function: FunctionTeacher | None = None
) -> Callable[[], dict[str, float]]:
    """What takes the numbers of engine and teachers since the last call, by the names of their metrics."""
    sources: list[tuple[str, Callable[[], dict[str, float]]]] = []
    if isinstance(engine, EngineWithStats):
        sources.append((engine.stats_prefix, engine.take_stats))
    if config.opd.opd_type == "sglang":
        from opd.rewards.on_policy_distillation import take_teacher_stats

        sources.append(("teacher_", take_teacher_stats))
    if function is not None:
        sources.append(("teacher_", function.take_stats))
    return lambda: {prefix + name: value for prefix, take in sources for name, value in take().items()}


def score_wait(config: Config, reward: RewardFn) -> ScoreWait | None:
    """Patience with a teacher that leaves too many samples of a rollout without a score; a co-loaded one never does."""
    if not config.scores_answers:
        return None
    return ScoreWait(
        scorer=reward, largest_share=config.opd.opd_max_unscored_share, seconds=config.opd.opd_teacher_wait
    )


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


def own_teacher_tokenizer(config: Config) -> Any | None:
    """The teacher's, when it is not the student's.

    Raises:
        ConfigError: a folder without a tokenizer.
    """
    folder = config.opd.opd_teacher_tokenizer
    if folder is None:
        return None
    return load_tokenizer(folder, config.output.trust_remote_code, flag="--opd-teacher-tokenizer")


def cross_tokenizer(config: Config, student: Any, teacher: Any | None) -> CrossTokenizer | None:
    """Between the tokenizers of the two; None when the teacher has the student's.

    Raises:
        TeacherError: tokenizers that do not tell which bytes a token writes.
    """
    if teacher is None:
        return None
    from opd.teachers.cross_tokenizer import between_folders

    return between_folders(
        student,
        teacher,
        student_folder=str(config.checkpoint.hf_checkpoint),
        teacher_folder=str(config.opd.opd_teacher_tokenizer),
        chat=config.data.apply_chat_template,
    )


def custom_teacher(config: Config, prompt: Prompt) -> FunctionTeacher:
    """The function of ``--opd-custom-teacher-path``, tried on ``prompt`` unless the flags say no.

    Raises:
        ConfigError: it cannot be loaded, or does not take two arguments.
        TeacherError: it raised something, or returned no row of log-probs.
    """
    from opd.teachers.function_teacher import FunctionTeacher
    from opd.user_functions import load_with_parameters

    flag, path = "opd_custom_teacher_path", str(config.opd.opd_custom_teacher_path)
    function = load_with_parameters(path, flag, "args, sample")
    teacher = FunctionTeacher(function, args=argparse.Namespace(**config.flat()), shown=flag_text(flag, path))
    if not config.opd.opd_skip_teacher_selftest:
        try:
            teacher.check(prompt)
        except TeacherError:
            teacher.close()
            raise
    return teacher


def check_served_teachers(config: Config, tokenizer: Any, teacher_tokenizer: Any | None = None) -> None:
    """``teacher_tokenizer``: see ``own_teacher_tokenizer``."""
    from opd.background_loop import BackgroundLoop

    by_address = {spec.location: spec for spec in reversed(teachers(config))}  # names that share one: the first
    loop = BackgroundLoop("teacher self-test")
    try:
        for spec in by_address.values():
            loop.run(_check_served_teacher(config, spec, tokenizer if teacher_tokenizer is None else teacher_tokenizer))
    finally:
        loop.close()


async def _check_served_teacher(config: Config, spec: TeacherSpec, tokenizer: Any) -> None:
    """Each of its addresses, then whether they agree."""
    from opd.teachers.agreement import check_agreement
    from opd.teachers.selftest import check_teacher
    from opd.teachers.sglang_teacher import SGLangTeacher

    flags = config.opd
    servers = [
        SGLangTeacher(
            address.url,
            timeout_s=flags.opd_teacher_timeout,
            retries=2,
            api_key=os.environ.get(flags.opd_teacher_api_key_env) if flags.opd_teacher_api_key_env else None,
            deadline_s=flags.opd_teacher_timeout,
            ca_file=flags.opd_teacher_ca_file,
            lead_prompts=False,
        )
        for address in addresses(str(spec.location))
    ]
    folder = flags.opd_teacher_tokenizer
    try:
        for server in servers:
            await check_teacher(
                server,
                tokenizer,
                student_folder=config.checkpoint.hf_checkpoint,
                shown=spec.shown if len(servers) == 1 else f"{spec.shown} (`{server.http.base_url}`)",
                own_tokenizer=None if folder is None else flag_text("opd_teacher_tokenizer", folder),
            )
        if len(servers) > 1:
            await check_agreement(servers, tokenizer, shown=spec.shown)
    finally:
        for server in servers:
            await server.close()
