"""The critic of PPO: a Megatron model with a scalar head that predicts, before each response token, the reward to come.

It has the student's body and layout, its own optimizer, its own checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from opd.config.file_rules import critic_folder
from opd.config.schema import Config
from opd.maths.value_loss import value_loss
from opd.megatron_backend import checkpoint
from opd.megatron_backend.hf_bridge import BridgedModel, ModelParts, model_parts
from opd.megatron_backend.losses import Sums
from opd.megatron_backend.optimizer import TrainableModel
from opd.megatron_backend.pipeline import MicroBatch, gather_tokens, micro_batch_limit, run, split, whole_tokens
from opd.megatron_backend.save_line import SaveLine
from opd.megatron_backend.update import mean_of, optimizer_steps
from opd.types import TokenBatch


def give_value_head(model: BridgedModel | ModelParts) -> None:
    """Puts a scalar head in the place of the output layer, on the last pipeline stage.

    It starts at 0: the first values are 0 in every layout, and the body is left alone until the head has learned a
    direction. It is whole on every tensor-parallel rank, as its input is, and so is its gradient.
    """
    for part in model_parts(model):
        part.share_embeddings_and_output_weights = False  # nothing is shared with an embedding any more
        if part.post_process:
            like = next(part.parameters())
            part.output_layer = torch.nn.Linear(
                part.config.hidden_size, 1, bias=False, device=like.device, dtype=like.dtype
            )
            torch.nn.init.zeros_(part.output_layer.weight)


class MegatronCritic:
    """``Critic`` on megatron-core; every method is called by all ranks together."""

    def __init__(self, config: Config, trainable: TrainableModel, *, saves: SaveLine | None = None) -> None:
        """``saves``: the student's, when both are on the same ranks; without it checkpoints are written at once."""
        self._config = config
        self._trainable = trainable
        self._saves = saves or SaveLine()
        self._limit = micro_batch_limit(config.parallel, context_parallel_size=config.parallel.context_parallel_size)
        self._term = _ValueTerm(clip=config.critic.value_clip)

    def forward_values(self, batch: TokenBatch) -> TokenBatch:
        """Fills ``values_T``: the value of the state before each response token, in units of reward."""

        def values(micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            values_R = _values(micro)
            return values_R.new_zeros(()), {"values": whole_tokens(micro, values_R[None])}

        plan = split(batch, self._limit)
        results = run(self._trainable.model, batch, plan, values, forward_only=True)
        (values_T,) = gather_tokens(batch.response_lengths, plan, [r["values"] for r in results], rows=1)
        return batch.with_(values_T=values_T)

    def start_update(self, batch: TokenBatch) -> Callable[[], dict[str, float]]:
        """See ``Critic.start_update``. It shares the student's ranks, so it is over when this returns.

        Raises:
            UpdateError: NaN or infinite gradients.
        """
        metrics = self.update(batch)
        return lambda: metrics

    def update(self, batch: TokenBatch) -> dict[str, float]:
        """Optimizer steps towards ``returns_T``, as many as the student makes; metrics are averages over them.

        Raises:
            UpdateError: NaN or infinite gradients.
        """
        metrics = mean_of(
            optimizer_steps(
                self._trainable,
                [self._term],
                batch,
                number=self._config.optimizer_steps_per_rollout,
                limit=self._limit,
                per_token=self._config.algorithm.calculate_per_token_loss,
            )
        )
        metrics["critic_grad_norm"], metrics["critic_lr"] = metrics.pop("grad_norm"), metrics.pop("lr")
        return metrics

    def close(self) -> None:
        """It ends with the student's process groups."""

    def save(self, iteration: int) -> None:
        """Raises:
        CheckpointError: it could not be written; the checkpoints before stay valid.
        """
        snapshot = checkpoint.take(
            critic_folder(self._config),
            iteration,
            model=self._trainable.model,
            optimizer=self._trainable.optimizer,
            scheduler=self._trainable.scheduler,
            copy=self._saves.background,
        )
        self._saves.add(snapshot.write)


class _ValueTerm:
    weights = "policy_weights_T"
    coef = 1.0
    metrics = ("value_loss", "value_clip_fraction", "value_mean", "return_mean")
    means = frozenset({"value_clip_fraction", "value_mean", "return_mean"})

    def __init__(self, *, clip: float) -> None:
        self._clip = clip

    def mask(self, batch: TokenBatch) -> torch.Tensor:
        return batch.own_mask_T

    def __call__(self, micro: MicroBatch, weights_R: torch.Tensor) -> tuple[torch.Tensor, Sums]:
        batch, rows = micro.batch, micro.rows
        values_R, returns_R, mask_R = _values(micro), rows(batch.returns_T), rows(batch.own_mask_T)
        loss_R, clipped_R = value_loss(values_R, rows(batch.values_T), returns_R, clip=self._clip)
        loss = (loss_R * weights_R).sum()
        return loss, {
            "value_loss": loss.detach(),
            "value_clip_fraction": (clipped_R * mask_R).sum(),
            "value_mean": (values_R.detach() * mask_R).sum(),
            "return_mean": (returns_R * mask_R).sum(),
        }


def _values(micro: MicroBatch) -> torch.Tensor:
    weight_1H = micro.model.output_layer.weight
    return (micro.replicated_hidden_RH().to(weight_1H.dtype) @ weight_1H.t())[:, 0].float()
