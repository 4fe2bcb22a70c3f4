"""One optimizer step over this rank's share of a global batch: weigh the tokens, run, step, add up the metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from opd.data.batching import MicroBatchLimit
from opd.errors import UpdateError
from opd.maths.masking import token_weights
from opd.megatron_backend.losses import LossTerm, Sums, weighted_sum
from opd.megatron_backend.moe import share_out_balancing
from opd.megatron_backend.optimizer import TrainableModel
from opd.megatron_backend.over_ranks import sum_over_ranks
from opd.megatron_backend.pipeline import current_device, from_last_stage, run, split
from opd.types import TokenBatch

logger = logging.getLogger(__name__)


def optimizer_steps(
    trainable: TrainableModel,
    terms: list[LossTerm],
    batch: TokenBatch,
    *,
    number: int,
    limit: MicroBatchLimit,
    per_token: bool,
    after_each: Callable[[], None] | None = None,
) -> list[dict[str, float]]:
    """One step for each ``optimizer_step_N``, in order, and ``after_each`` after it; the metrics of each. There is none
    for a number that no sample has left (``rank_share`` gives every rank a sample of the others).

    Raises:
        UpdateError: NaN or infinite gradients; the weights are as before that step.
    """
    steps_N = batch.optimizer_step_N.tolist()
    metrics = []
    for number_of_step in range(number):
        members = [i for i, step in enumerate(steps_N) if step == number_of_step]
        if not members:
            logger.warning("optimizer step %d of %d is left out: its answers were aborted", number_of_step + 1, number)
            continue
        share = batch.select(members)
        metrics.append(_optimizer_step(trainable, terms, share, limit=limit, per_token=per_token))
        if after_each is not None:
            trainable.gather_parameters()
            after_each()
    trainable.gather_parameters()
    return metrics


def mean_of(metrics: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}


def _optimizer_step(
    trainable: TrainableModel, terms: list[LossTerm], batch: TokenBatch, *, limit: MicroBatchLimit, per_token: bool
) -> dict[str, float]:
    batch, tokens = _weigh(batch, terms, per_token=per_token)
    trainable.zero_grad()
    plan = split(batch, limit)
    share_out_balancing(trainable.model, 1 / (len(plan) * mpu.get_data_parallel_world_size()))
    outputs = run(trainable.model, batch, plan, weighted_sum(terms), forward_only=False)
    learning_rate = trainable.optimizer.param_groups[0]["lr"]
    _check_gradients(trainable)
    _, grad_norm, _ = trainable.optimizer.step()
    trainable.scheduler.step(increment=1)
    sums = _global_sums(outputs, [name for term in terms for name in term.metrics])
    metrics = {
        name: sums[name] / tokens[term.weights] if name in term.means else sums[name]
        for term in terms
        for name in term.metrics
    }
    return {**metrics, "grad_norm": float(grad_norm), "lr": float(learning_rate)}


def _check_gradients(trainable: TrainableModel) -> None:
    """megatron-core looks for NaN only where it scales a loss for fp16: it would step, and leave NaN for weights.

    Raises:
        UpdateError: on all ranks, as the norm is of all gradients.
    """
    trainable.optimizer.prepare_grads()
    if not math.isfinite(trainable.optimizer.get_grad_norm()):
        raise UpdateError(
            "the gradients hold NaN or infinity, so the weights were not updated. Lower --lr, or look at the last"
            " rollout's rewards and log-probs in OUTPUT_DIR/samples"
        )


def _weigh(batch: TokenBatch, terms: list[LossTerm], *, per_token: bool) -> tuple[TokenBatch, dict[str, float]]:
    """Gives every token its weight in each term's loss, and counts each term's tokens, over the global batch."""
    weights, sums = {}, {}
    for term in terms:
        mask_T = term.mask(batch)
        weights[term.weights], denominator = token_weights(mask_T, batch.response_lengths, per_token=per_token)
        sums |= {f"{term.weights} denominator": denominator, f"{term.weights} tokens": float(mask_T.sum())}
    total = sum_over_ranks(sums, {})
    for name in weights:
        weights[name] = weights[name] / max(total[f"{name} denominator"], 1.0)
    return batch.with_(**weights), {name: max(total[f"{name} tokens"], 1.0) for name in weights}


def _global_sums(outputs: list[Sums], names: list[str]) -> dict[str, float]:
    """Sums of per-micro-batch numbers over micro-batches, data- and context-parallel ranks, on every rank."""
    total = torch.zeros(len(names), device=current_device())
    for output in outputs:
        total += torch.stack([output[name].float() for name in names])
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    if mpu.is_pipeline_last_stage() and group.size() > 1:
        dist.all_reduce(total, group=group)
    return dict(zip(names, from_last_stage(total).tolist(), strict=True))
