"""Config -> what rank 0 alone has: the engine that writes, drivers with rewards, the journal, the reporter."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opd.build_rewards import reward_functions, score_wait, scoring_stats
from opd.cluster.place import Place
from opd.config.mixture_rules import mixing_teacher, scale_of
from opd.config.queries import given
from opd.config.schema import Config
from opd.interfaces import RolloutEngine
from opd.rollout.ahead import BackgroundRollouts
from opd.rollout.driver import RolloutDriver, RolloutResult, keep_rewards
from opd.rollout.journal import FOLDER, RolloutJournal
from opd.rollout.journaled import JournaledEngine, JournaledReward
from opd.rollout.mixture_engine import MixtureEngine, ScaleSchedule
from opd.rollout.speculative_kd import SpeculativeKDEngine
from opd.rollout.torch_engine import TorchEngine
from opd.run_state import RunState
from opd.serving.hosts import ServerHost, ThisMachine
from opd.types import Mixture

if TYPE_CHECKING:
    from opd.report.reporter import Reporter
    from opd.teachers.cross_tokenizer import CrossTokenizer
    from opd.teachers.function_teacher import FunctionTeacher


@dataclass(frozen=True, kw_only=True)
class Writing:
    """See ``opd.step.Parts``; nothing on ranks that do not generate."""

    rollout: RolloutDriver | None = None
    eval_rollout: RolloutDriver | None = None
    eval_scoring: RolloutDriver | None = None
    reporter: Reporter | None = None
    journal: RolloutJournal | None = None
    background: BackgroundRollouts[RolloutResult | None] | None = None


def build_writing(
    config: Config,
    stack: ExitStack,
    state: RunState,
    place: Place,
    *,
    device: torch.device,
    context: int,
    identity: dict[str, Any],
    text: CrossTokenizer | None,
    function: FunctionTeacher | None,
    tokenizer: Any,
) -> Writing:
    """
    Args:
        context: tokens of prompt and answer at most.
        identity: what makes a journal this run's.
        text: of a teacher with another tokenizer.
        function: a teacher that is one.
    """
    from opd.report.reporter import Reporter

    engine, student = _engines(config, device, context, place)
    stack.callback(engine.close)
    journal = _journal(config, state, identity)
    if journal is not None:
        stack.callback(journal.close)
    drivers = _drivers(config, engine, student, text=text, function=function, journal=journal, tokenizer=tokenizer)
    for driver in drivers:
        if driver is not None:
            stack.callback(driver.close)
    rollout, eval_rollout, eval_scoring = drivers
    reporter = stack.enter_context(
        Reporter(
            config.output,
            total_steps=config.rollout.num_rollout,
            start_step=state.step,
            run_flags=config.flat(),
            given_flags={name: value for section in config.sections() for name, value in given(section).items()},
        )
    )
    background = None
    if config.rollouts_ahead > 0:
        background = BackgroundRollouts()
        stack.callback(background.close)
    return Writing(
        rollout=rollout,
        eval_rollout=eval_rollout,
        eval_scoring=eval_scoring,
        reporter=reporter,
        journal=journal,
        background=background,
    )


def _drivers(
    config: Config,
    engine: RolloutEngine,
    student: RolloutEngine,
    *,
    text: CrossTokenizer | None,
    function: FunctionTeacher | None,
    journal: RolloutJournal | None,
    tokenizer: Any,
) -> tuple[RolloutDriver, RolloutDriver, RolloutDriver | None]:
    """(of the training samples; of the evaluation's, which have the task's reward alone; of those of the evaluation's
    that the teacher scores too, unless it is co-loaded)."""
    args = argparse.Namespace(**config.flat())
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    task_reward, reward, post_process = reward_functions(config, text, function)
    # Every driver takes them at its end, so that those of the training are not mixed with the evaluation's.
    common = {"args": args, "decode": decode, "take_scoring_stats": scoring_stats(config, engine, function)}
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
    if config.opd.use_opd and config.scores_answers:  # not in the journal, which is of training samples
        sampled = reward.of_sampled_tokens()
        scoring = RolloutDriver(student, reward=sampled, post_process=post_process, **common, loop=rollout.loop)
    return rollout, evaluation, scoring


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
