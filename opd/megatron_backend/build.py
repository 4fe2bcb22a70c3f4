"""Config -> trainer: process groups, student, optimizer, co-loaded teacher, and what a resume brings back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from opd.config.model_rules import teacher_facts
from opd.config.schema import Config
from opd.megatron_backend import checkpoint
from opd.megatron_backend.groups import ParallelSizes, init_distributed
from opd.megatron_backend.hf_bridge import BridgedModel, build_model, load_hf_weights, read_hf_config
from opd.megatron_backend.optimizer import TrainableModel, make_trainable
from opd.megatron_backend.trainer import MegatronTrainer
from opd.teachers.coloaded_teacher import ColoadedTeacher

logger = logging.getLogger(__name__)


def build_trainer(config: Config, device: torch.device) -> tuple[MegatronTrainer, dict[str, Any] | None]:
    """The trainer and, when ``--load`` holds a checkpoint, the ``extra`` state saved with it.

    Raises:
        CheckpointError, UnsupportedModelError, FileNotFoundError: a folder that cannot be used.
    """
    sizes = parallel_sizes(config)
    init_distributed(
        sizes, device=device, seed=config.optimizer.seed, timeout_minutes=config.output.distributed_timeout_minutes
    )
    student, extra = _build_student(config, sizes)
    teacher = ColoadedTeacher(_build_teacher(config, sizes)) if config.opd.opd_type == "megatron" else None
    return MegatronTrainer(config, student, teacher), extra


def parallel_sizes(config: Config) -> ParallelSizes:
    flags = config.parallel
    return ParallelSizes(
        tp=flags.tensor_model_parallel_size, pp=flags.pipeline_model_parallel_size, cp=flags.context_parallel_size
    )


def _build_student(config: Config, sizes: ParallelSizes) -> tuple[TrainableModel, dict[str, Any] | None]:
    flags = config.checkpoint
    resumed = _has_checkpoint(flags.load)
    model = _build(config, sizes, flags.hf_checkpoint)
    if not resumed:
        _load_weights(model, flags.ref_load if _has_checkpoint(flags.ref_load) else flags.hf_checkpoint)
    steps = config.rollout.num_rollout * config.optimizer_steps_per_rollout
    student = make_trainable(model, config, total_optimizer_steps=steps)
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


def _build_teacher(config: Config, sizes: ParallelSizes) -> BridgedModel:
    flags = config.opd
    model = _build(config, sizes, teacher_facts(config).source.parent)
    _load_weights(model, flags.opd_teacher_load, step=flags.opd_teacher_ckpt_step)
    return model


def _build(config: Config, sizes: ParallelSizes, hf_folder: str | Path) -> BridgedModel:
    parallel = config.parallel
    return build_model(
        read_hf_config(hf_folder, trust_remote_code=config.output.trust_remote_code),
        sizes,
        dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
    )


def _load_weights(model: BridgedModel, folder: str, step: int | None = None) -> None:
    """Weights from a torch_dist or a Hugging Face folder."""
    if any(Path(folder).glob("*.safetensors")):
        load_hf_weights(model, folder)
    else:
        checkpoint.load(folder, model=model, step=step)


def _has_checkpoint(folder: str | None) -> bool:
    """A folder that does not exist yet, or is empty, is where the first checkpoint will go: nothing to resume."""
    return folder is not None and Path(folder).is_dir() and checkpoint.latest_iteration(folder) is not None
