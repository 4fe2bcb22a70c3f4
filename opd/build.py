"""Config -> the parts of a run. Only this file, ``build_data`` and ``build_rewards`` name implementations."""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opd.build_data import (
    answers_from_file,
    evaluation_sets,
    probe_text,
    sampling_params,
    stop_token_ids,
    training_prompts,
)
from opd.build_rewards import (
    check_served_teachers,
    cross_tokenizer,
    own_teacher_tokenizer,
    reward_functions,
    score_wait,
    scoring_stats,
)
from opd.cluster.place import ALONE, Place
from opd.config.mixture_rules import mixing_teacher, scale_of
from opd.config.model_rules import max_context_len, student_facts
from opd.config.queries import given
from opd.config.schema import Config
from opd.cost_account import CostAccount
from opd.data.tokenizer import load_tokenizer
from opd.interfaces import Critic, RolloutEngine
from opd.preemption import StopRequest
from opd.rollout.ahead import BackgroundRollouts
from opd.rollout.driver import RolloutDriver, keep_rewards
from opd.rollout.journal import FOLDER, RolloutJournal, journal_identity
from opd.rollout.journaled import JournaledEngine, JournaledReward
from opd.rollout.mixture_engine import MixtureEngine, ScaleSchedule
from opd.rollout.partial_state import check_in_flight
from opd.rollout.speculative_kd import SpeculativeKDEngine
from opd.rollout.torch_engine import TorchEngine
from opd.run_state import RunState
from opd.serving.hosts import ServerHost, ThisMachine
from opd.step import Parts
from opd.types import Mixture

if TYPE_CHECKING:
    from opd.megatron_backend.save_line import SaveLine
    from opd.teachers.cross_tokenizer import CrossTokenizer

logger = logging.getLogger(__name__)


def build(config: Config, stack: ExitStack, stop: StopRequest, place: Place = ALONE) -> tuple[Parts, RunState]:
    """Everything a run needs, cheap checks first; ``stack`` closes what was started, in reverse order.

    ``stop`` is handed on. ``place``: what a launcher has started around this rank.

    Raises:
        ConfigError, PromptDataError: data that cannot be used.
        TeacherError: a teacher server that fails its self-test.
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
    if leader and config.opd.opd_type == "sglang" and not config.opd.opd_skip_teacher_selftest:
        check_served_teachers(config, tokenizer, teacher_tokenizer)

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

    rollout = eval_rollout = eval_scoring = reporter = journal = background = None
    if leader:
        from opd.report.reporter import Reporter

        engine, student = _engines(config, device, context, place)
        stack.callback(engine.close)
        journal = _journal(config, state, identity)
        if journal is not None:
            stack.callback(journal.close)
        rollout, eval_rollout, eval_scoring = _drivers(
            config, engine, student, text=text, journal=journal, tokenizer=tokenizer
        )
        stack.callback(rollout.close)
        stack.callback(eval_rollout.close)
        if eval_scoring is not None:
            stack.callback(eval_scoring.close)
        reporter = stack.enter_context(
            Reporter(
                config.output,
                total_steps=config.rollout.num_rollout,
                start_step=state.step,
                run_flags=config.flat(),
                given_flags={name: value for section in config.sections() for name, value in given(section).items()},
            )
        )
        if config.rollouts_ahead > 0:
            background = BackgroundRollouts()
            stack.callback(background.close)
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
        rollout=rollout,
        eval_rollout=eval_rollout,
        eval_scoring=eval_scoring,
        reporter=reporter,
        decode=tokenizer.decode,
        cost=CostAccount(config),
        probe=probe_text(prompts),
        background=background,
        journal=journal,
        stop=stop,
    )
    return parts, state


def _drivers(
    config: Config,
    engine: RolloutEngine,
    student: RolloutEngine,
    *,
    text: CrossTokenizer | None,
    journal: RolloutJournal | None,
    tokenizer: Any,
) -> tuple[RolloutDriver, RolloutDriver, RolloutDriver | None]:
    """(of the training samples; of the evaluation's, which have the task's reward alone; of those of the evaluation's
    that a served teacher scores too)."""
    args = argparse.Namespace(**config.flat())
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    task_reward, reward, post_process = reward_functions(config, text)
    # Every driver takes them at its end, so that those of the training are not mixed with the evaluation's.
    common = {"args": args, "decode": decode, "take_scoring_stats": scoring_stats(config, engine)}
    journaled = reward if journal is None else JournaledReward(reward, journal)
    rollout = RolloutDriver(
        engine if journal is None else JournaledEngine(engine, journal),
        reward=journaled,
        post_process=post_process,
        **common,
        score_wait=score_wait(config, journaled),
    )
    evaluation = RolloutDriver(student, reward=task_reward, post_process=keep_rewards, **common)
    scoring = None
    if config.opd.use_opd and config.opd.opd_type == "sglang":  # not in the journal, which is of training samples
        scoring = RolloutDriver(student, reward=reward, post_process=post_process, **common, loop=rollout.loop)
    return rollout, evaluation, scoring


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


def _journal(config: Config, state: RunState, identity: dict[str, Any]) -> RolloutJournal | None:
    """Of a run that saves. Without intervals it could only be resumed after an orderly end: the last steps will do."""
    flags = config.checkpoint
    if flags.save is None:
        return None
    return RolloutJournal(
        Path(flags.save) / FOLDER,
        identity=identity,
        resumed_step=state.step,
        beside_checkpoint=flags.load is not None and Path(flags.load).resolve() == Path(flags.save).resolve(),
        max_staleness=config.rollouts_ahead,
        keep_steps=None if flags.save_interval else 1 + config.rollouts_ahead,
    )


def _engines(
    config: Config, device: torch.device, max_context_len: int, place: Place
) -> tuple[RolloutEngine, RolloutEngine]:
    """(what writes the training samples, what writes the evaluation's: the student alone)."""
    flags, dtype = config.rollout, torch.bfloat16 if config.model.bf16 else torch.float32
    if flags.rollout_engine == "sglang":
        from opd.rollout.sglang_engine import start_engine

        host: ServerHost = ThisMachine()
        if place.rollout is not None:
            from opd.cluster.ray_settings import is_loopback, set_up_ray

            set_up_ray(loopback=is_loopback(place.rollout.address))
            from opd.cluster.ray_servers import joined_host

            host = joined_host(place.rollout, on_gpus=device.type == "cuda")
        engine = start_engine(config, dtype=dtype, device=device, max_context_len=max_context_len, host=host)
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
    if not config.written_with_teacher:
        return student, student
    mixing = mixing_teacher(config)
    folder = config.opd.opd_teacher_load if mixing is None else mixing.folder
    if folder is None:
        teacher = model
    else:
        transformers_logging.disable_progress_bar()  # the run has bars of its own
        teacher = AutoModelForCausalLM.from_pretrained(folder, **options).to(device)
    if mixing is not None:
        return _mixture_engine(config, student, teacher), student
    return SpeculativeKDEngine(student, teacher, top_k=flags.skd_top_k), student


def _mixture_engine(config: Config, student: TorchEngine, teacher: nn.Module) -> MixtureEngine:
    flags = config.mixture
    start, end, rollouts = scale_of(config)
    return MixtureEngine(
        student,
        teacher,
        Mixture(method=flags.mixture_alpha_method, fixed_alpha=flags.mixture_fixed_alpha),
        schedule=ScaleSchedule(start=start, end=end, rollouts=rollouts),
        decoding=flags.mixture_decoding,
        draft_tokens=flags.mixture_draft_tokens,
        teacher_max_context_len=teacher.config.max_position_embeddings,
    )
