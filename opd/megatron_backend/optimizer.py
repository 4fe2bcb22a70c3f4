"""Megatron's DDP, optimizer and learning-rate schedule, from our flags."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from opd.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class TrainableModel:
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def make_trainable(model: torch.nn.Module, config: Config, *, total_optimizer_steps: int) -> TrainableModel:
    """Wraps ``model`` (parameters in the training type) and gives it an optimizer with fp32 master weights."""
    flags = config.optimizer
    distributed = config.parallel.use_distributed_optimizer
    mcore_config = model.config
    if config.model.bf16:
        model = Float16Module(mcore_config, model)
    ddp = DistributedDataParallel(
        mcore_config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed),
        model,
    )
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
            use_distributed_optimizer=distributed,
        ),
        [ddp],
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
    return TrainableModel(model=ddp, optimizer=optimizer, scheduler=scheduler)


def _sum_gradients(models: list[torch.nn.Module], num_tokens: object = None, **kwargs: object) -> None:
    finalize_model_grads(models, None, **kwargs)
