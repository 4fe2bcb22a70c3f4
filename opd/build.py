"""Config -> the parts of a run. Only this file and the ``build_*`` ones name implementations."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from opd.build_data import (
    answers_from_file,
    evaluation_sets,
    probe_text,
    sampling_params,
    stop_token_ids,
    training_prompts,
)
from opd.build_rewards import check_served_teachers, cross_tokenizer, custom_teacher, own_teacher_tokenizer
from opd.build_rollout import Writing, build_writing
from opd.cluster.place import ALONE, Place
from opd.config.model_rules import max_context_len, student_facts
from opd.config.schema import Config
from opd.cost_account import CostAccount
from opd.data.prompts import PromptDataset
from opd.data.tokenizer import load_tokenizer
from opd.interfaces import Critic
from opd.preemption import StopRequest
from opd.rollout.journal import journal_identity
from opd.rollout.partial_state import check_in_flight
from opd.run_state import RunState
from opd.shared_failure import share_failure
from opd.step import Parts
from opd.teachers.coloaded_tokenizers import check_coloaded_tokenizers
from opd.user_functions import custom_divergence

if TYPE_CHECKING:
    from opd.megatron_backend.save_line import SaveLine
    from opd.teachers.function_teacher import FunctionTeacher


def build(config: Config, stack: ExitStack, stop: StopRequest, place: Place = ALONE) -> tuple[Parts, RunState]:
    """Everything a run needs, cheap checks first; ``stack`` closes what was started, in reverse order.

    ``stop`` is handed on. ``place``: what a launcher has started around this rank.

    Raises:
        ConfigError, PromptDataError: data that cannot be used.
        TeacherError: a teacher server that fails its self-test, a teacher's function that fails its trial, or a
            co-loaded teacher with another tokenizer.
        CheckpointError, UnsupportedModelError: a folder that cannot be loaded.
    """
    identity = journal_identity(config)  # of the flags as they were given: the port of a teacher of our own changes
    if place.teacher_url is not None:
        config = replace(config, reward=replace(config.reward, rm_url=place.teacher_url))
    tokenizer = load_tokenizer(config.checkpoint.hf_checkpoint, config.output.trust_remote_code)
    context = max_context_len(config, student_facts(config))
    teacher_tokenizer = own_teacher_tokenizer(config)
    text = cross_tokenizer(config, tokenizer, teacher_tokenizer)
    prompts = training_prompts(config, tokenizer, context, teacher_tokenizer)
    eval_sets = evaluation_sets(config, tokenizer, context)
    answers = answers_from_file(config, tokenizer, context)
    leader = int(os.environ.get("RANK", "0")) == 0
    function = _try_teachers(config, stack, prompts, tokenizer, teacher_tokenizer) if leader else None
    custom_divergence(config)  # tried before the models are loaded

    from opd.megatron_backend import device as megatron_device

    device = megatron_device.install()
    from opd.megatron_backend.build import build_trainer

    trainer, extra = build_trainer(config, device)
    stack.callback(trainer.close)
    state = RunState() if extra is None else RunState.from_json(extra)
    critic = _critic(config, place, trainer.saves, resumed_step=state.step or None) if config.uses_critic else None
    if critic is not None:
        stack.callback(critic.close)
    if state.prompts is not None:
        prompts.restore(state.prompts)
    check_in_flight(state.in_flight, config, max_context_len=context)
    if answers is not None and state.answers is not None:
        answers.restore(state.answers)

    write = partial(
        build_writing,
        config,
        stack,
        state,
        place,
        device=device,
        context=context,
        identity=identity,
        text=text,
        function=function,
        tokenizer=tokenizer,
    )
    writing = share_failure(trainer, write if leader else Writing)
    train_sampling, eval_sampling = sampling_params(config, stop_token_ids(config, tokenizer))
    parts = Parts(
        config=config,
        trainer=trainer,
        critic=critic,
        prompts=prompts,
        answers=answers,
        eval_sets=eval_sets,
        train_sampling=train_sampling,
        eval_sampling=eval_sampling,
        rollout=writing.rollout,
        eval_rollout=writing.eval_rollout,
        eval_scoring=writing.eval_scoring,
        reporter=writing.reporter,
        decode=tokenizer.decode,
        cost=CostAccount(config),
        probe=probe_text(prompts),
        background=writing.background,
        journal=writing.journal,
        stop=stop,
    )
    return parts, state


def _try_teachers(
    config: Config, stack: ExitStack, prompts: PromptDataset, tokenizer: Any, teacher_tokenizer: Any | None
) -> FunctionTeacher | None:
    """Every teacher that can be tried before the models are loaded; the function of --opd-type custom is kept."""
    check_coloaded_tokenizers(config, tokenizer)
    if config.opd.opd_type == "sglang" and not config.opd.opd_skip_teacher_selftest:
        check_served_teachers(config, tokenizer, teacher_tokenizer)
    if config.opd.opd_type != "custom":
        return None
    function = custom_teacher(config, prompts.all()[0])
    stack.callback(function.close)
    return function


def _critic(config: Config, place: Place, saves: SaveLine, *, resumed_step: int | None) -> Critic:
    """On the training ranks, or where the launcher has put it."""
    if place.critic is None:
        from opd.megatron_backend.build import build_critic

        return build_critic(config, resumed_step=resumed_step, saves=saves)
    from megatron.core import parallel_state as mpu

    from opd.cluster.remote_critic import RemoteCritic

    return RemoteCritic(
        place.critic,
        group=mpu.get_data_parallel_group(),
        resumed_step=resumed_step,
        timeout_s=60.0 * config.output.distributed_timeout_minutes,
    )
