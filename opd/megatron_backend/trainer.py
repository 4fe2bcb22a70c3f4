"""The trainer: a Megatron student and its co-loaded teachers, log-probs, update, checkpoints, weight export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from opd.config.file_rules import critic_folder
from opd.config.schema import Config
from opd.data.batching import rank_share
from opd.megatron_backend import checkpoint, groups
from opd.megatron_backend.checkpoint_retention import Retention, prune
from opd.megatron_backend.hf_bridge import bridged_model, export_hf_weights
from opd.megatron_backend.hf_export import export_hf
from opd.megatron_backend.lora import merged_view
from opd.megatron_backend.losses import loss_terms
from opd.megatron_backend.optimizer import TrainableModel
from opd.megatron_backend.over_ranks import from_all_shares, from_first_rank, on_any_rank, sum_over_ranks
from opd.megatron_backend.peft_export import save_peft_adapter
from opd.megatron_backend.pipeline import micro_batch_limit
from opd.megatron_backend.response_scores import ResponseScores, response_scores
from opd.megatron_backend.save_line import SaveLine
from opd.megatron_backend.teacher_pass import TeacherPass
from opd.megatron_backend.update import mean_of, optimizer_steps
from opd.teachers.coloaded_teacher import ColoadedTeacher, MovingAverageTeacher
from opd.types import TokenBatch

PEFT_FOLDER = "peft"  # beside the checkpoints: the latest adapters, as the peft library loads them
MOVING_AVERAGE_FOLDER = "moving_average_teacher"  # beside the student's checkpoints


class MegatronTrainer:
    """``Trainer`` on megatron-core; every method is called by all ranks together."""

    def __init__(
        self,
        config: Config,
        student: TrainableModel,
        *,
        teachers: TeacherPass | None = None,
        reference: ColoadedTeacher | None = None,
        moving_average: MovingAverageTeacher | None = None,
        saves: SaveLine | None = None,
    ) -> None:
        """
        Args:
            moving_average: the teacher among ``teachers`` that follows the student.
            saves: where checkpoints are written; without it at once. A critic on the same ranks shares it.
        """
        self._config = config
        self._student = student
        self._teachers = teachers
        self._reference = reference
        self._moving_average = moving_average
        self.saves = saves or SaveLine()
        self._saving: int | None = None  # the step of a save that nobody has heard of yet
        self._limit = micro_batch_limit(config.parallel, context_parallel_size=config.parallel.context_parallel_size)
        self._terms = loss_terms(config, teachers)

    def load(self, batch: TokenBatch | None) -> TokenBatch:
        """This data-parallel rank's share of rank 0's batch; the other ranks pass None."""
        if batch is None and dist.get_rank() == 0:
            raise ValueError("rank 0 has to give the batch")
        size, mine = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        for rank in range(size):  # one after the other: with likely tokens a rollout has tens of gigabytes
            share = from_first_rank(None if batch is None else rank_share(batch, rank=rank, size=size))
            if rank == mine:
                own = share
        return own

    def forward_logprobs(self, batch: TokenBatch, model: str) -> TokenBatch:
        """See ``Trainer.forward_logprobs``.

        Raises:
            ValueError: a model that this run did not load.
        """
        policy, kl = self._config.rollout.rollout_temperature, self._config.kl_temperature
        if model == "student":
            temperatures = [policy] if policy == kl else [policy, kl]
            saved = self._config.saved_alternatives
            scores = self._response_scores(self._student.model, batch, temperatures, likely=saved)
            return batch.with_(
                student_logprobs_T=scores.logprobs[0],
                student_kl_logprobs_T=scores.logprobs[-1],
                student_entropy_T=scores.entropy_T,
                student_likely=scores.likely,
            )
        if model == "teacher" and self._teachers is not None:
            return self._teachers.score(batch)
        if model == "reference" and self._reference is not None:
            with self._reference.on_device() as reference:
                return batch.with_(ref_logprobs_T=self._response_scores(reference, batch, [policy]).logprobs[0])
        raise ValueError(f"no {model} model is loaded in this run")

    def map(self, fn: Callable[..., TokenBatch], batch: TokenBatch) -> TokenBatch:
        """``fn`` on this rank's share; it may reduce over ``data_parallel_group``."""
        group = mpu.get_data_parallel_group()
        return fn(batch, data_parallel_group=group if group.size() > 1 else None)

    def update(self, batch: TokenBatch) -> dict[str, float]:
        """One optimizer step for each ``optimizer_step_N``; metrics are averages over these steps."""
        metrics = optimizer_steps(
            self._student,
            self._terms,
            batch,
            number=self._config.optimizer_steps_per_rollout,
            limit=self._limit,
            per_token=self._config.algorithm.calculate_per_token_loss,
            after_each=None if self._moving_average is None else self._follow,
        )
        if self._teachers is not None:
            self._teachers.forget()
        return {"policy_loss": 0.0, **mean_of(metrics)}  # distillation alone has no policy term

    def from_all_shares(self, values: dict[int, Any]) -> dict[int, Any]:
        """See ``Trainer.from_all_shares``."""
        return from_all_shares(values)

    def sum_over_ranks(self, sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
        """Adds up, or takes the largest of, per-share numbers over the data-parallel ranks."""
        return sum_over_ranks(sums, maxima)

    def on_any_rank(self, yes: bool) -> bool:
        """See ``Trainer.on_any_rank``: one number over all ranks."""
        return on_any_rank(yes)

    def from_first_rank(self, value: Any) -> Any:
        """See ``Trainer.from_first_rank``."""
        return from_first_rank(value)

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return export_hf_weights(self._student.model)

    def score(self, batch: TokenBatch) -> torch.Tensor:
        """Temperature-1 log-probs of the student, whole on every rank: what a rollout engine must agree with."""
        return self._response_scores(self._student.model, batch, [1.0]).logprobs[0]

    def save(self, iteration: int, *, extra: dict[str, Any]) -> None:
        """Writes one checkpoint under ``--save``, or with ``--async-save`` takes a copy that is written while training
        goes on; ``finished_save`` says when it is there. An export and a PEFT adapter are written at once.

        Raises:
            CheckpointError: it could not be written; the checkpoints before stay valid.
        """
        folder, flags, leader = Path(self._config.checkpoint.save), self._config.checkpoint, dist.get_rank() == 0
        copy = self.saves.background
        checkpoint.together((lambda: checkpoint.write_hf_files(flags.hf_checkpoint, folder)) if leader else None)
        if self._moving_average is not None:  # first: a student's checkpoint must find its teacher's
            average = checkpoint.take(
                folder / MOVING_AVERAGE_FOLDER, iteration, model=self._moving_average.model, copy=copy
            )
            self.saves.add(average.write)
        snapshot = checkpoint.take(
            folder,
            iteration,
            model=self._student.model,
            optimizer=self._student.optimizer,
            scheduler=self._student.scheduler,
            with_rng=True,
            extra=extra,
            copy=copy,
        )
        self.saves.add(snapshot.write)
        self._saving = iteration
        self.saves.add(lambda group: self._prune(folder) if leader else None)
        if self._config.lora.lora_rank is not None:
            self._save_peft(folder / PEFT_FOLDER)
        if flags.save_hf is not None:
            export_hf(
                self.export_weights(),
                Path(flags.save_hf.format(rollout_id=iteration)),
                origin=Path(flags.hf_checkpoint),
                max_file_bytes=int(flags.save_hf_shard_gb * 1e9),
            )

    def finished_save(self, *, wait: bool) -> int | None:
        """See ``Trainer.finished_save``."""
        if self._saving is None or (self.saves.background and not wait and self.on_any_rank(self.saves.writing)):
            return None
        iteration, self._saving = self._saving, None
        self.saves.settle()
        return iteration

    def _prune(self, folder: Path) -> None:
        flags = self._config.checkpoint
        retention = Retention(newest=flags.save_retain, interval=flags.save_retain_interval)
        critics = critic_folder(self._config)
        prune(folder, retention, companions=[folder / MOVING_AVERAGE_FOLDER, *([critics] if critics else [])])

    def _save_peft(self, folder: Path) -> None:
        base = self._config.checkpoint.ref_load or self._config.checkpoint.hf_checkpoint
        failure: OSError | None = None
        try:
            save_peft_adapter(self._student.model, folder, base_model_name_or_path=base)
        except OSError as error:  # on rank 0, which writes; the checkpoint itself is in place
            failure = error
        reason = from_first_rank(None if failure is None else str(failure))
        if reason is not None:
            raise checkpoint.CheckpointError(f"could not write the PEFT adapter to `{folder}`: {reason}") from failure

    def close(self) -> None:
        """Waits for a checkpoint that is being written, and leaves the process groups."""
        self.saves.close()
        groups.shutdown()

    def _response_scores(
        self, model: torch.nn.Module, batch: TokenBatch, temperatures: list[float], *, likely: int = 0
    ) -> ResponseScores:
        chunk = self._config.parallel.logits_chunk_tokens
        return response_scores(model, batch, limit=self._limit, chunk=chunk, temperatures=temperatures, likely=likely)

    def _follow(self) -> None:
        self._moving_average.follow(merged_view(bridged_model(self._student.model)))
