"""Config -> trainer: process groups, student, optimizer, co-loaded teacher, and what a resume brings back."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu

from opd.config.file_rules import has_hf_weights
from opd.config.layout_rules import pipeline_parts, teacher_expert_ranks
from opd.config.model_rules import coloaded_teachers, student_facts, teacher_facts
from opd.config.schema import Config
from opd.config.teachers import TeacherSpec, teachers
from opd.megatron_backend import checkpoint
from opd.megatron_backend.critic import MegatronCritic, give_value_head
from opd.megatron_backend.groups import Layout, ParallelSizes, init_distributed
from opd.megatron_backend.hf_bridge import (
    BridgedModel,
    ModelParts,
    build_model,
    load_hf_weights,
    output_head,
    read_hf_config,
)
from opd.megatron_backend.lora import add_adapters
from opd.megatron_backend.moe import ExpertSettings
from opd.megatron_backend.optimizer import (
    TrainableModel,
    allocate_moments,
    fuses_gradient_accumulation,
    make_trainable,
)
from opd.megatron_backend.pipeline import micro_batch_limit
from opd.megatron_backend.save_line import SaveLine
from opd.megatron_backend.shared_folder import check_shared
from opd.megatron_backend.teacher_layout import RelaidTeacher
from opd.megatron_backend.teacher_pass import Teacher, TeacherPass
from opd.megatron_backend.trainer import MOVING_AVERAGE_FOLDER, MegatronTrainer
from opd.teachers.coloaded_teacher import ColoadedTeacher, LiveTeacher, MovingAverageTeacher

logger = logging.getLogger(__name__)


def build_trainer(config: Config, device: torch.device) -> tuple[MegatronTrainer, dict[str, Any] | None]:
    """The trainer and, when ``--load`` holds a checkpoint, the ``extra`` state saved with it.

    Raises:
        CheckpointError, UnsupportedModelError, FileNotFoundError: a folder that cannot be used.
    """
    join_world(config, device)
    if config.checkpoint.save is not None:
        check_shared("save", config.checkpoint.save)
    sizes = parallel_sizes(config)
    student, extra = _build_student(config, sizes)
    if config.releases_engine_memory and device.type == "cuda":
        allocate_moments(student.optimizer)
    moving_average = None
    reference = _reference(config, sizes) if _needs_initial_weights(config) else None
    teacher_pass = None
    if config.opd.opd_type == "megatron":
        if config.opd.opd_teacher_self == "ema":
            moving_average = _moving_average(config, sizes, resumed_step=extra and extra["step"])
        own = {"live": _live_teacher(config, student), "frozen": reference, "ema": moving_average}
        teacher_pass = _teachers(config, sizes, own.get(config.opd.opd_teacher_self or ""))
    trainer = MegatronTrainer(
        config,
        student,
        teachers=teacher_pass,
        reference=reference if config.needs_reference else None,
        moving_average=moving_average,
        saves=SaveLine(background=config.checkpoint.async_save),
    )
    return trainer, extra


def join_world(config: Config, device: torch.device) -> None:
    """The ranks of this world find each other; for ``build_critic`` without a trainer."""
    if config.rollout.rollout_engine == "sglang":
        # SGLang turns it off for itself, and both ends of a weight broadcast must do the same. NCCL reads it once.
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    init_distributed(
        parallel_sizes(config),
        device=device,
        seed=config.optimizer.seed,
        timeout_minutes=config.output.distributed_timeout_minutes,
    )


def build_critic(config: Config, *, resumed_step: int | None, saves: SaveLine | None = None) -> MegatronCritic:
    """PPO's value model, after ``build_trainer`` or, on ranks of its own, ``join_world``.

    Args:
        resumed_step: of the student; the critic resumes from its checkpoint of the same step.
        saves: the trainer's, on the same ranks.

    Raises:
        CheckpointError: the student resumes and its critic's checkpoint is not there.
    """
    flags, sizes = config.critic, parallel_sizes(config)
    own = flags.critic_load if _has_checkpoint(flags.critic_load) else None
    if own is None and resumed_step is not None:
        own = flags.critic_save or str(Path(config.checkpoint.load) / "critic")
    model = _build(config, sizes, config.checkpoint.hf_checkpoint)
    if own is None:
        given = flags.critic_load
        _load_weights(model, given if given and has_hf_weights(Path(given)) else _weights_before_training(config))
    give_value_head(model)
    optimizer = dataclasses.replace(
        config.optimizer, lr=flags.critic_lr or config.optimizer.lr, lr_warmup_iters=flags.critic_lr_warmup_iters
    )
    critic = make_trainable(
        model, dataclasses.replace(config, optimizer=optimizer), total_optimizer_steps=_optimizer_steps(config)
    )
    if own is not None:
        loaded = checkpoint.load(
            own, model=critic.model, optimizer=critic.optimizer, scheduler=critic.scheduler, step=resumed_step
        )
        logger.info("loaded the critic from %s", loaded.path)
    return MegatronCritic(config, critic, saves=saves)


def parallel_sizes(config: Config) -> ParallelSizes:
    flags = config.parallel
    return ParallelSizes(
        tp=flags.tensor_model_parallel_size,
        pp=flags.pipeline_model_parallel_size,
        cp=flags.context_parallel_size,
        vpp=pipeline_parts(config, student_facts(config)),
        ep=flags.expert_model_parallel_size,
        etp=flags.expert_tensor_parallel_size,
    )


def teacher_sizes(config: Config) -> ParallelSizes | None:
    """Of a co-loaded teacher with a layout of its own; None: it lies as the student does."""
    own, student = config.own_teacher_sizes, parallel_sizes(config)
    sizes = ParallelSizes(
        tp=own.get("opd_teacher_tensor_model_parallel_size", student.tp),
        pp=own.get("opd_teacher_pipeline_model_parallel_size", student.pp),
        cp=own.get("opd_teacher_context_parallel_size", student.cp),
        ep=teacher_expert_ranks(config, *(facts for _, facts in coloaded_teachers(config))),
        etp=1 if student.etp == 1 else None,
    )
    return None if not own or sizes == student else sizes


def _build_student(config: Config, sizes: ParallelSizes) -> tuple[TrainableModel, dict[str, Any] | None]:
    flags = config.checkpoint
    resumed = _has_checkpoint(flags.load)
    lora = config.lora
    model = _build(config, sizes, flags.hf_checkpoint, transformer_engine=lora.lora_rank is None)
    if not resumed or lora.lora_rank is not None:  # a checkpoint of adapters holds no base weights
        _load_weights(model, _base_weights(config))
    if lora.lora_rank is not None:
        add_adapters(
            model,
            rank=lora.lora_rank,
            alpha=lora.lora_alpha,
            target_modules=lora.lora_target_modules,
            seed=config.optimizer.seed,
        )
    student = make_trainable(model, config, total_optimizer_steps=_optimizer_steps(config))
    if not resumed:
        return student, None
    full = not (flags.finetune or flags.no_load_optim)
    loaded = checkpoint.load(
        flags.load,
        model=student.model,
        optimizer=student.optimizer if full else None,
        scheduler=student.scheduler if full else None,
        with_rng=not (flags.finetune or flags.no_load_rng),
    )
    if not full:
        student.optimizer.reload_model_params()
    logger.info("loaded %s", loaded.path)
    return student, None if flags.finetune or not loaded.extra else loaded.extra


def _optimizer_steps(config: Config) -> int:
    return config.rollout.num_rollout * config.optimizer_steps_per_rollout


def _needs_initial_weights(config: Config) -> bool:
    return config.needs_reference or config.opd.opd_teacher_self == "frozen"


def _reference(config: Config, sizes: ParallelSizes) -> ColoadedTeacher:
    """The student before its first step, also after a resume."""
    model = _build(config, sizes, config.checkpoint.hf_checkpoint)
    _load_weights(model, _weights_before_training(config))
    return ColoadedTeacher(model, output_head)


def _live_teacher(config: Config, student: TrainableModel) -> LiveTeacher:
    asks_for_head = config.distillation.distillation_type is not None and mpu.is_pipeline_last_stage()
    return LiveTeacher(student.model, output_head if asks_for_head else None)


def _moving_average(config: Config, sizes: ParallelSizes, *, resumed_step: int | None) -> MovingAverageTeacher:
    """Raises CheckpointError when the student resumes and its average's checkpoint of that step is not there."""
    model = _build(config, sizes, config.checkpoint.hf_checkpoint)
    if resumed_step is not None:
        checkpoint.load(Path(config.checkpoint.load) / MOVING_AVERAGE_FOLDER, model=model, step=resumed_step)
    else:
        _load_weights(model, _weights_before_training(config))
    return MovingAverageTeacher(model, output_head, decay=config.opd.opd_teacher_ema_decay)


def _teachers(config: Config, sizes: ParallelSizes, own: Teacher | None) -> TeacherPass:
    """``own``: the teacher that the student is itself. Names with the same folder share one model."""
    specs = teachers(config)
    if own is not None:
        return TeacherPass(config, specs, [own])
    own_sizes = teacher_sizes(config)
    layout = None if own_sizes is None else Layout(own_sizes, timeout_minutes=config.output.distributed_timeout_minutes)
    by_folder: dict[Path, Teacher | RelaidTeacher] = {}
    for spec in specs:
        folder = Path(spec.location).resolve()
        if folder not in by_folder:
            by_folder[folder] = _teacher(config, spec, sizes, layout)
    return TeacherPass(config, specs, [by_folder[Path(spec.location).resolve()] for spec in specs])


def _teacher(config: Config, spec: TeacherSpec, sizes: ParallelSizes, layout: Layout | None) -> Teacher | RelaidTeacher:
    def build() -> ColoadedTeacher:
        folder = teacher_facts(config, spec.location).source.parent
        model = _build(config, sizes if layout is None else layout.sizes, folder)
        _load_weights(model, spec.location, step=config.opd.opd_teacher_ckpt_step)
        return ColoadedTeacher(model, output_head)

    if layout is None:
        return build()
    limit = micro_batch_limit(config.parallel, context_parallel_size=layout.sizes.cp)
    asks_for_head = TeacherPass.asks_for_heads(config)
    multiple = config.model.make_vocab_size_divisible_by if asks_for_head else None
    return RelaidTeacher(layout, build, limit=limit, head_vocab_multiple=multiple)


def _build(
    config: Config, sizes: ParallelSizes, hf_folder: str | Path, *, transformer_engine: bool = True
) -> BridgedModel | ModelParts:
    parallel, experts = config.parallel, config.experts
    balanced = experts.moe_router_load_balancing_type == "aux_loss"
    return build_model(
        read_hf_config(hf_folder, trust_remote_code=config.output.trust_remote_code),
        sizes,
        dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
        transformer_engine=transformer_engine,
        gradient_accumulation_fusion=fuses_gradient_accumulation(parallel),
        experts=ExpertSettings(
            aux_loss_coeff=experts.moe_aux_loss_coeff if balanced else 0.0,
            router_fp32=experts.moe_router_dtype == "fp32",
        ),
    )


def _base_weights(config: Config) -> str:
    flags = config.checkpoint
    return flags.ref_load if _has_checkpoint(flags.ref_load) else flags.hf_checkpoint


def _weights_before_training(config: Config) -> str:
    """The student's at step 0: its base, or what --finetune takes from --load unless --ref-load says otherwise."""
    flags = config.checkpoint
    finetuned = flags.finetune and config.lora.lora_rank is None and _has_checkpoint(flags.load)
    return flags.load if finetuned and not _has_checkpoint(flags.ref_load) else _base_weights(config)


def _load_weights(model: BridgedModel | ModelParts, folder: str, step: int | None = None) -> None:
    """Weights from a torch_dist or a Hugging Face folder."""
    if has_hf_weights(Path(folder)):
        load_hf_weights(model, folder)
    else:
        checkpoint.load(folder, model=model, step=step)


def _has_checkpoint(folder: str | None) -> bool:
    """A folder that does not exist yet, or is empty, is where the first checkpoint will go: nothing to resume."""
    return folder is not None and Path(folder).is_dir() and checkpoint.latest_iteration(folder) is not None
