"""Megatron's DDP, optimizer and learning-rate schedule, from our flags."""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from opd.config.schema import Config, ParallelFlags
from opd.megatron_backend.hf_bridge import BridgedModel, ModelParts, model_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainableModel:
    """
    Attributes:
        model: what runs, is saved and exported: the wrapped model, or the parts of an interleaved pipeline.
        wrapped: the model in Megatron's DDP, or each of its parts.
    """

    model: torch.nn.Module
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def zero_grad(self) -> None:
        for part in self.wrapped:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()

    def gather_parameters(self) -> None:
        """Completes what ``--overlap-param-gather`` leaves to the next forward pass: whoever reads the weights comes
        after this."""
        for part in self.wrapped:
            if part.ddp_config.overlap_param_gather:
                part.start_param_sync(force_sync=True)


def make_trainable(model: BridgedModel | ModelParts, config: Config, *, total_optimizer_steps: int) -> TrainableModel:
    """Wraps ``model`` (parameters in the training type) and gives it an optimizer with fp32 master weights."""
    flags = config.optimizer
    mcore_config = model.config
    wrapped = [_in_ddp(part, config, first=number == 0) for number, part in enumerate(model_parts(model))]
    for ddp in wrapped:
        ddp.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=flags.optimizer,
            lr=flags.lr,
            min_lr=flags.min_lr,
            weight_decay=flags.weight_decay,
            adam_beta1=flags.adam_beta1,
            adam_beta2=flags.adam_beta2,
            adam_eps=flags.adam_eps,
            clip_grad=flags.clip_grad,
            bf16=config.model.bf16,
            params_dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_param_gather,
        ),
        wrapped,
    )
    decay_steps = flags.lr_decay_iters or total_optimizer_steps
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=flags.lr,
        min_lr=flags.min_lr,
        lr_warmup_steps=flags.lr_warmup_iters,
        lr_decay_steps=max(decay_steps, flags.lr_warmup_iters + 1),
        lr_decay_style=flags.lr_decay_style,
        start_wd=flags.weight_decay,
        end_wd=flags.weight_decay,
        wd_incr_steps=max(decay_steps, 1),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # on resume the flags of this run win
    )
    # The loss carries its global denominator already, so gradients are only summed.
    mcore_config.finalize_model_grads_func = _sum_gradients
    mcore_config.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap_grad_reduce:
        # Gradients of a step's earlier micro-batches are only added up; the last one's trigger the reduction.
        no_sync = [ddp.no_sync for ddp in wrapped]
        mcore_config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    if isinstance(model, ModelParts):
        model.running = tuple(wrapped)
    return TrainableModel(
        model=model if isinstance(model, ModelParts) else wrapped[0],
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=scheduler,
    )


def allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Gives Adam's moments their memory, as zeros, before the first step does: a server that shares the device sizes
    its cache by what is free when it starts. Moments that are there, of a checkpoint, stay."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.is_stub_optimizer:
            continue
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.AdamW):  # counts each parameter's steps beside them
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.zeros(()))


def fuses_gradient_accumulation(flags: ParallelFlags) -> bool:
    """Whether --gradient-accumulation-fusion takes effect: its kernel is apex's or Transformer Engine's."""
    return flags.gradient_accumulation_fusion and _has_fusion_kernel()


@functools.cache  # one warning for all models
def _has_fusion_kernel() -> bool:
    kernels = ("transformer_engine", "fused_weight_gradient_mlp_cuda")
    if torch.cuda.is_available() and any(importlib.util.find_spec(name) for name in kernels):
        return True
    logger.warning(
        "--gradient-accumulation-fusion is left out: it needs a GPU with Transformer Engine or apex. Gradients are the "
        "same without it"
    )
    return False


def _in_ddp(part: BridgedModel, config: Config, *, first: bool) -> DistributedDataParallel:
    parallel = config.parallel
    return DistributedDataParallel(
        part.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
        ),
        Float16Module(part.config, part) if config.model.bf16 else part,
        # Later parts of an interleaved pipeline are needed later: one bucket is enough for them.
        disable_bucketing=not first,
    )


def _sum_gradients(models: list[torch.nn.Module], num_tokens: object = None, **kwargs: object) -> None:
    finalize_model_grads(models, None, **kwargs)
