"""Config -> the parts of a run. The only file that names implementations."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd.config.model_rules import coloaded_teachers, max_context_len, student_facts
from opd.config.paths import load_function
from opd.config.schema import Config
from opd.config.teachers import teachers
from opd.data.answers import AnswerDataset, AnswerSource
from opd.data.batching import make_batch
from opd.data.prompts import Prompt, PromptDataset
from opd.data.teacher_prompts import TeacherPrompts
from opd.data.tokenizer import eos_token_ids, load_tokenizer
from opd.interfaces import PostProcessFn, RewardFn, RolloutEngine
from opd.rollout.driver import RolloutDriver, keep_rewards
from opd.rollout.speculative_kd import SpeculativeKDEngine
from opd.rollout.torch_engine import TorchEngine
from opd.run_state import RunState
from opd.step import Parts
from opd.types import Sample, SampleStatus, SamplingParams, TokenBatch

logger = logging.getLogger(__name__)


def build(config: Config, stack: ExitStack) -> tuple[Parts, RunState]:
    """Everything a run needs, cheap checks first; ``stack`` closes what was started, in reverse order.

    Raises:
        ConfigError, PromptDataError: data that cannot be used.
        TeacherError: a teacher server that fails its self-test.
        CheckpointError, UnsupportedModelError: a folder that cannot be loaded.
    """
    tokenizer = load_tokenizer(config.checkpoint.hf_checkpoint, config.output.trust_remote_code)
    context = max_context_len(config, student_facts(config))
    prompts, eval_sets = _prompts(config, tokenizer, context), _eval_sets(config, tokenizer, context)
    answers = _answers(config, tokenizer, context)
    leader = int(os.environ.get("RANK", "0")) == 0
    if leader and config.opd.opd_type == "sglang" and not config.opd.opd_skip_teacher_selftest:
        _test_teacher(config, tokenizer)

    from opd.megatron_backend import device as megatron_device

    device = megatron_device.install()
    from opd.megatron_backend.build import build_critic, build_trainer

    trainer, extra = build_trainer(config, device)
    stack.callback(trainer.close)
    state = RunState() if extra is None else RunState.from_json(extra)
    critic = build_critic(config, resumed_step=state.step or None) if config.uses_critic else None
    if state.prompts is not None:
        prompts.restore(state.prompts)
    if answers is not None and state.answers is not None:
        answers.restore(state.answers)

    rollout = eval_rollout = reporter = None
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    if leader:
        from opd.report.reporter import Reporter

        engine, student = _engines(config, device, context)
        stack.callback(engine.close)
        args = argparse.Namespace(**config.flat())
        task_reward, reward, post_process = _rewards(config)
        rollout = RolloutDriver(
            engine,
            reward=reward,
            post_process=post_process,
            args=args,
            decode=decode,
            take_scoring_stats=_scoring_stats(config, engine),
        )
        eval_rollout = RolloutDriver(student, reward=task_reward, post_process=keep_rewards, args=args, decode=decode)
        stack.callback(rollout.close)
        stack.callback(eval_rollout.close)
        reporter = stack.enter_context(
            Reporter(
                config.output, total_steps=config.rollout.num_rollout, start_step=state.step, run_flags=config.flat()
            )
        )
    train_sampling, eval_sampling = _sampling(config, _stop_ids(config, tokenizer))
    parts = Parts(
        config=config,
        trainer=trainer,
        critic=critic,
        prompts=prompts,
        answers=answers,
        eval_sets=eval_sets,
        train_sampling=train_sampling,
        eval_sampling=eval_sampling,
        rollout=rollout,
        eval_rollout=eval_rollout,
        reporter=reporter,
        decode=tokenizer.decode,
        probe=_probe(prompts),
    )
    return parts, state


def _prompts(config: Config, tokenizer: Any, max_context_len: int) -> PromptDataset:
    data = config.data
    return PromptDataset(
        data.prompt_data,
        input_key=data.input_key,
        label_key=data.label_key,
        metadata_key=data.metadata_key,
        tokenizer=tokenizer,
        apply_chat_template=data.apply_chat_template,
        max_prompt_len=data.rollout_max_prompt_len,
        max_context_len=max_context_len,
        shuffle=data.rollout_shuffle,
        seed=config.rollout.rollout_seed,
        teacher=_teacher_prompts(config),
    )


def _teacher_prompts(config: Config) -> TeacherPrompts | None:
    opd, specs = config.opd, teachers(config)
    if not specs:
        return None
    routed = opd.opd_teacher_combine == "route" and len(specs) > 1
    return TeacherPrompts(
        prompt_key=opd.opd_teacher_prompt_key,
        template=opd.opd_teacher_prompt_template,
        system_prompt=opd.opd_teacher_system_prompt,
        route_key=opd.opd_teacher_key if routed else None,
        names=tuple(spec.name for spec in specs),
        positions=tuple(facts.max_position_embeddings for _, facts in coloaded_teachers(config)),
        max_response_len=config.rollout.rollout_max_response_len,
    )


def _answers(config: Config, tokenizer: Any, max_context_len: int) -> AnswerDataset | None:
    data, flags = config.data, config.off_policy
    if flags.sft_data is None:
        return None
    teacher = _teacher_prompts(config)
    if teacher is not None and config.distillation.distillation_type is None:  # then its scores are not used
        teacher = dataclasses.replace(teacher, prompt_key=None, template=None, system_prompt=None, route_key=None)
    shows_label = teacher is not None and "{label}" in (teacher.template or "")
    source = AnswerSource(
        path=Path(flags.sft_data),
        input_key=data.input_key,
        label_key=data.label_key if shows_label else None,  # nothing judges these answers
        metadata_key=data.metadata_key,
        apply_chat_template=data.apply_chat_template,
        teacher=teacher,
        response_key=flags.sft_response_key,
    )
    return AnswerDataset(
        source,
        tokenizer=tokenizer,
        end_ids=_stop_ids(config, tokenizer),
        max_prompt_len=data.rollout_max_prompt_len,
        max_response_len=config.rollout.rollout_max_response_len,
        max_context_len=max_context_len,
        shuffle=data.rollout_shuffle,
        seed=config.rollout.rollout_seed,
    )


def _eval_sets(config: Config, tokenizer: Any, max_context_len: int) -> list[tuple[str, list[Prompt]]]:
    data = config.data
    return [
        (
            name,
            PromptDataset(
                path,
                input_key=config.eval.eval_input_key or data.input_key,
                label_key=config.eval.eval_label_key or data.label_key,
                metadata_key=data.metadata_key,
                tokenizer=tokenizer,
                apply_chat_template=data.apply_chat_template,
                max_context_len=max_context_len,
                for_evaluation=True,
            ).all(),
        )
        for name, path in config.eval_sets
    ]


def _stop_ids(config: Config, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end an answer, ascending."""
    own = eos_token_ids(config.checkpoint.hf_checkpoint, tokenizer)
    return tuple(sorted({*own, *(config.rollout.rollout_stop_token_ids or ())}))


def _sampling(config: Config, stop_ids: tuple[int, ...]) -> tuple[SamplingParams, SamplingParams]:
    flags, evaluation = config.rollout, config.eval
    train = SamplingParams(
        temperature=flags.rollout_temperature,
        top_p=flags.rollout_top_p,
        top_k=flags.rollout_top_k,
        max_new_tokens=flags.rollout_max_response_len,
        stop_token_ids=stop_ids,
        seed=flags.rollout_seed,
        top_ids=_student_top_ids(config),
    )
    return train, dataclasses.replace(
        train,
        top_ids=0,
        temperature=evaluation.eval_temperature,
        top_p=evaluation.eval_top_p,
        top_k=evaluation.eval_top_k,
        max_new_tokens=evaluation.eval_max_response_len or train.max_new_tokens,
        seed=flags.rollout_seed + 1,  # other noise than the training samples with the same index
    )


def _student_top_ids(config: Config) -> int:
    """How many of its likeliest tokens the student reports: a served teacher has to be asked about them by id."""
    flags = config.distillation
    asked = config.opd.opd_type == "sglang" and flags.distillation_support in ("student", "union")
    return (flags.distillation_top_k or 0) if asked else 0


def _engines(config: Config, device: torch.device, max_context_len: int) -> tuple[RolloutEngine, RolloutEngine]:
    """(what writes the training samples, what writes the evaluation's: the student alone)."""
    flags, dtype = config.rollout, torch.bfloat16 if config.model.bf16 else torch.float32
    if flags.rollout_engine == "sglang":
        from opd.rollout.sglang_engine import start_engine

        engine = start_engine(config, dtype=dtype, device=device, max_context_len=max_context_len)
        return engine, engine

    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    options = {"dtype": dtype, "attn_implementation": "sdpa", "trust_remote_code": config.output.trust_remote_code}
    model_config = AutoConfig.from_pretrained(
        config.checkpoint.hf_checkpoint, trust_remote_code=config.output.trust_remote_code
    )
    with device:  # weights come from the trainer before the first answer
        model = AutoModelForCausalLM.from_config(model_config, **options)
    student = TorchEngine(
        model, max_running_requests=flags.rollout_max_running_requests, max_context_len=max_context_len
    )
    if flags.rollout_engine == "torch":
        return student, student
    transformers_logging.disable_progress_bar()  # the run has bars of its own
    teacher = AutoModelForCausalLM.from_pretrained(config.opd.opd_teacher_load, **options).to(device)
    return SpeculativeKDEngine(student, teacher, top_k=flags.skd_top_k), student


def _rewards(config: Config) -> tuple[RewardFn, RewardFn, PostProcessFn]:
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


def _scoring_stats(config: Config, engine: RolloutEngine) -> Callable[[], dict[str, float]]:
    if isinstance(engine, SpeculativeKDEngine):
        return engine.take_stats
    if config.opd.opd_type != "sglang":
        return dict
    from opd.rewards.on_policy_distillation import take_teacher_stats

    return take_teacher_stats


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


def _test_teacher(config: Config, tokenizer: Any) -> None:
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


def _probe(prompts: PromptDataset) -> TokenBatch:
    """The first prompt with at least two tokens, all but its first token as the "response"."""
    ids = next((p.ids for p in prompts.all() if len(p.ids) > 1), None)
    if ids is None:
        ids = prompts.all()[0].ids * 2
    sample = Sample(
        index=0,
        group_index=0,
        prompt="",
        tokens=list(ids),
        response_length=len(ids) - 1,
        rollout_log_probs=[0.0] * (len(ids) - 1),
        status=SampleStatus.COMPLETED,
    )
    return make_batch([sample], torch.zeros(1), samples_per_step=1)
