"""The trainer: a Megatron student (and a co-loaded teacher), log-probs, policy update, checkpoints, weight export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from opd.config.schema import Config
from opd.data.batching import data_parallel_share
from opd.errors import UpdateError
from opd.maths.logprobs import token_logprobs
from opd.maths.masking import token_weights
from opd.maths.policy_loss import clipped_policy_loss
from opd.megatron_backend import checkpoint, groups
from opd.megatron_backend.hf_bridge import export_hf_weights
from opd.megatron_backend.optimizer import TrainableModel
from opd.megatron_backend.packing import PackedMicroBatch
from opd.megatron_backend.pipeline import from_last_stage, response_logprobs, run, split
from opd.teachers.coloaded_teacher import ColoadedTeacher
from opd.types import TokenBatch


class MegatronTrainer:
    """``Trainer`` on megatron-core; every method is called by all ranks together."""

    def __init__(self, config: Config, student: TrainableModel, teacher: ColoadedTeacher | None) -> None:
        self._config = config
        self._student = student
        self._teacher = teacher
        self._max_tokens = config.parallel.max_tokens_per_gpu * config.parallel.context_parallel_size
        clip = config.algorithm
        self._eps = {
            "eps_low": clip.eps_clip,
            "eps_high": clip.eps_clip if clip.eps_clip_high is None else clip.eps_clip_high,
        }

    def load(self, batch: TokenBatch | None) -> TokenBatch:
        """This data-parallel rank's share of rank 0's batch; the other ranks pass None."""
        if dist.get_world_size() > 1:
            box = [batch]
            dist.broadcast_object_list(box, src=0)
            batch = box[0]
        if batch is None:
            raise ValueError("rank 0 has to give the batch")
        mine = data_parallel_share(batch, rank=mpu.get_data_parallel_rank(), size=mpu.get_data_parallel_world_size())
        return batch.select(mine)

    def forward_logprobs(self, batch: TokenBatch, model: str) -> TokenBatch:
        """See ``Trainer.forward_logprobs``.

        Raises:
            ValueError: "teacher" without a co-loaded teacher.
        """
        if model == "teacher":
            if self._teacher is None:
                raise ValueError("no teacher is co-loaded: --opd-type megatron loads one")
            with self._teacher.on_device() as teacher:
                (logprobs_T,) = response_logprobs(
                    teacher, batch, max_tokens=self._max_tokens, temperatures=[self._config.kl_temperature]
                )
            everything_N = torch.ones(len(batch), dtype=torch.bool)
            return batch.with_(teacher_logprobs_T=logprobs_T, teacher_scored_N=everything_N)
        policy, kl = self._config.rollout.rollout_temperature, self._config.kl_temperature
        temperatures = [policy] if policy == kl else [policy, kl]
        scores = response_logprobs(self._student.model, batch, max_tokens=self._max_tokens, temperatures=temperatures)
        return batch.with_(student_logprobs_T=scores[0], student_kl_logprobs_T=scores[-1])

    def map(self, fn: Callable[..., TokenBatch], batch: TokenBatch) -> TokenBatch:
        """``fn`` on this rank's share; it may reduce over ``data_parallel_group``."""
        group = mpu.get_data_parallel_group()
        return fn(batch, data_parallel_group=group if group.size() > 1 else None)

    def update(self, batch: TokenBatch) -> dict[str, float]:
        """One optimizer step for each ``optimizer_step_N``; metrics are averages over these steps."""
        steps_N = batch.optimizer_step_N.tolist()
        number = self._config.optimizer_steps_per_rollout
        results = [
            self._optimizer_step(batch.select([i for i, s in enumerate(steps_N) if s == k])) for k in range(number)
        ]
        return {name: sum(r[name] for r in results) / number for name in results[0]}

    def sum_over_ranks(self, sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
        """Adds up, or takes the largest of, per-share numbers over the data-parallel ranks."""
        if mpu.get_data_parallel_world_size() == 1:
            return {**sums, **maxima}
        merged = {}
        for values, op in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
            tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
            dist.all_reduce(tensor, op=op, group=mpu.get_data_parallel_group())
            merged.update(zip(values, tensor.tolist(), strict=True))
        return merged

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return export_hf_weights(self._student.model)

    def score(self, batch: TokenBatch) -> torch.Tensor:
        """Temperature-1 log-probs of the student, whole on every rank: what a rollout engine must agree with."""
        return response_logprobs(self._student.model, batch, max_tokens=self._max_tokens, temperatures=[1.0])[0]

    def save(self, iteration: int, *, extra: dict[str, Any]) -> None:
        """Writes one checkpoint under ``--save``.

        Raises:
            CheckpointError: it could not be written; the checkpoints before stay valid.
        """
        folder = self._config.checkpoint.save
        checkpoint.save(
            folder,
            iteration,
            model=self._student.model,
            optimizer=self._student.optimizer,
            scheduler=self._student.scheduler,
            with_rng=True,
            extra=extra,
        )
        if dist.get_rank() == 0:
            checkpoint.write_hf_files(self._config.checkpoint.hf_checkpoint, folder)

    def close(self) -> None:
        """Leaves the process groups."""
        groups.shutdown()

    def _optimizer_step(self, batch: TokenBatch) -> dict[str, float]:
        weights_T, denominator = token_weights(
            batch.loss_mask_T, batch.response_lengths, per_token=self._config.algorithm.calculate_per_token_loss
        )
        totals = self.sum_over_ranks({"denominator": denominator, "tokens": float(batch.loss_mask_T.sum())}, {})
        denominator, tokens = max(totals["denominator"], 1.0), max(totals["tokens"], 1.0)
        tp_group = mpu.get_tensor_model_parallel_group()
        group = tp_group if tp_group.size() > 1 else None
        temperature = self._config.rollout.rollout_temperature

        def loss(
            micro: TokenBatch, packed: PackedMicroBatch, logits_RV: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            def mine(values_T: torch.Tensor) -> torch.Tensor:
                return values_T.to(logits_RV.device)[packed.place_R]

            logprobs_R = token_logprobs(logits_RV, packed.target_ids_R, temperature=temperature, group=group)
            loss_R, clipped_R = clipped_policy_loss(
                logprobs_R, mine(micro.student_logprobs_T), mine(micro.advantages_T), **self._eps
            )
            mask_R, weight_R = mine(micro.loss_mask_T), mine(micro.loss_weights_T)
            policy_loss = (loss_R * weight_R * mask_R).sum() / denominator
            outputs = {
                "policy_loss": policy_loss.detach(),
                "clip_fraction": (clipped_R * mask_R).sum() / tokens,
            }
            return policy_loss, outputs

        model, optimizer = self._student.model, self._student.optimizer
        model.zero_grad_buffer()
        optimizer.zero_grad()
        weighted = batch.with_(loss_weights_T=weights_T)
        outputs = run(model, weighted, split(weighted, max_tokens=self._max_tokens), loss, forward_only=False)
        learning_rate = optimizer.param_groups[0]["lr"]
        successful, grad_norm, _ = optimizer.step()
        if not successful:
            raise UpdateError(
                "the gradients hold NaN or infinity, so the weights were not updated. Lower --lr, or look at the last"
                " rollout's rewards and log-probs in OUTPUT_DIR/samples"
            )
        self._student.scheduler.step(increment=1)
        metrics = self._global_sums(outputs, ["policy_loss", "clip_fraction"])
        return {**metrics, "grad_norm": float(grad_norm), "lr": float(learning_rate)}

    def _global_sums(self, outputs: list[dict[str, torch.Tensor]], names: list[str]) -> dict[str, float]:
        """Sums of per-micro-batch numbers over micro-batches, data- and context-parallel ranks, on every rank."""
        total = torch.zeros(len(names), device=self._device)
        for output in outputs:
            total += torch.stack([output[name].float() for name in names])
        if mpu.is_pipeline_last_stage() and mpu.get_data_parallel_group(with_context_parallel=True).size() > 1:
            dist.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return dict(zip(names, from_last_stage(total).tolist(), strict=True))

    @property
    def _device(self) -> torch.device:
        return next(self._student.model.parameters()).device
