"""One checkpoint as it is at a moment, and putting it on disk: what each rank writes, and how it appears whole or not.

A save is taken (``take``) and then written (``Snapshot.write``): with a copy of the tensors in between, training can go
on while the files are written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from opd.megatron_backend.adapter_checkpoint import adapter_parts, trainable_state
from opd.megatron_backend.checkpoint_layout import (
    CheckpointError,
    DirectoryWriter,
    Iteration,
    folder_name,
    latest_iteration,
)
from opd.megatron_backend.optimizer_state import METADATA, optimizer_parts
from opd.megatron_backend.rng_state import rng_bytes, rng_file
from opd.megatron_backend.torch_dist_files import FilePlan, Piece, pieces_of, plan_files, write_index, write_pieces


class Scheduler(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One rank's part of a checkpoint, ready to be written: the pieces that it writes, and small files as bytes."""

    directory: Path
    iteration: Iteration
    plan: FilePlan
    common: bytes
    extra: str
    rng: bytes | None

    def write(self, group: dist.ProcessGroup | None = None, *, max_file_bytes: int | None = None) -> Path:
        """Writes the checkpoint and makes it the latest; all ranks take part and return when it is in place.

        Args:
            group: of all ranks, for what they tell each other; another thread's training must not use it.
            max_file_bytes: a file with tensors that has this many takes no further one.

        Raises:
            CheckpointError: on every rank, when any rank could not write (disk full, no permission). What was written
                is removed, and the previous checkpoint stays the latest.
        """
        rank = dist.get_rank(group)
        writer = DirectoryWriter(self.directory, self.iteration)
        results: list[list[Any]] = [[] for _ in range(dist.get_world_size(group))]

        def write_own() -> None:
            if self.rng is not None:
                (writer.temporary / rng_file(rank)).write_bytes(self.rng)
            found = write_pieces(writer.temporary, self.plan.pieces, rank=rank, max_file_bytes=max_file_bytes)
            results[rank].extend(found)

        def write_common() -> None:
            write_index(writer.temporary, self.plan.metadata, results)
            (writer.temporary / "common.pt").write_bytes(self.common)
            (writer.temporary / "extra.json").write_text(self.extra)
            # Its presence says that the tensors are complete; Megatron reads the format from it.
            save_config(CheckpointingConfig("torch_dist"), str(writer.temporary))

        try:
            together(writer.begin if rank == 0 else None, group)
            together(write_own, group)
            gathered = [[] for _ in results] if rank == 0 else None
            dist.gather_object(results[rank], gathered, dst=0, group=group)
            results = gathered or results
            together(write_common if rank == 0 else None, group)
            together(writer.commit if rank == 0 else None, group)
        except CheckpointError as error:
            if rank == 0:
                writer.abort()
            raise CheckpointError(
                f"could not save step {self.iteration} to `{self.directory}`: {error}; {_kept(self.directory)}. Free "
                "space or choose another --save."
            ) from error
        return self.directory / folder_name(self.iteration)


def take(
    directory: str | Path,
    iteration: Iteration,
    *,
    model: torch.nn.Module,
    optimizer: Any | None = None,
    scheduler: Scheduler | None = None,
    with_rng: bool = False,
    extra: dict[str, Any] | None = None,
    copy: bool = False,
) -> Snapshot:
    """What a checkpoint of this moment consists of; all ranks take part.

    Args:
        optimizer: a megatron-core optimizer, distributed or not.
        extra: JSON-able; rank 0's is written.
        copy: copy the tensors to the host's memory, so that the snapshot stays what it is when training goes on.
            Without it the snapshot has to be written before the next step.
    """
    # A mistake in ``extra`` must show before anything is written.
    extra_text = json.dumps(extra or {}, indent=1)
    parts = _common(iteration) | adapter_parts(model) | {"model": trainable_state(model, dict(METADATA))}
    shards: list[Piece] = []
    if optimizer is not None:
        parts["optimizer"], shards = optimizer_parts(optimizer, parts["model"])
    if scheduler is not None:
        parts["opt_param_scheduler"] = scheduler.state_dict()
    sharded, common = save_preprocess(parts)
    plan = plan_files(pieces_of(sharded) + shards)
    return Snapshot(
        directory=Path(directory),
        iteration=iteration,
        plan=replace(plan, pieces=[_copied(piece) for piece in plan.pieces]) if copy else plan,
        common=_as_bytes(common),
        extra=extra_text,
        rng=rng_bytes() if with_rng else None,
    )


def weights_alone(directory: str | Path, pieces: list[Piece]) -> Snapshot:
    """A ``release`` of weights that need not be in memory: each piece is read when it is written. All ranks take part,
    each with its share of the pieces."""
    common = _as_bytes(_common("release"))
    return Snapshot(
        directory=Path(directory), iteration="release", plan=plan_files(pieces), common=common, extra="{}", rng=None
    )


def _common(iteration: Iteration) -> dict[str, Any]:
    return {
        "iteration": 0 if iteration == "release" else iteration,
        "checkpoint_version": 3.0,
        "content_metadata": dict(METADATA),
    }


def _as_bytes(common: dict[str, Any]) -> bytes:
    """As they are now: the state goes on changing. torch.save into a file would also turn a full disk into an
    unspecific RuntimeError."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return buffer.getvalue()


def together(action: Callable[[], object] | None, group: dist.ProcessGroup | None = None) -> None:
    """Runs the action on the ranks that have one and waits for all.

    Raises:
        CheckpointError: on every rank, when it failed on any.
    """
    reason = None
    try:
        if action is not None:
            action()
    except (OSError, RuntimeError) as error:
        reason = _reason(error)
    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, reason, group=group)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text is not None]
    if failed:
        raise CheckpointError("; ".join(failed))


def _copied(piece: Piece) -> Piece:
    value = piece.read()
    if isinstance(value, torch.Tensor):
        value = value.to("cpu", copy=True)
    return Piece(piece.item, lambda: value)


def _kept(directory: Path) -> str:
    previous = latest_iteration(directory) if directory.is_dir() else None
    return "there is no earlier checkpoint" if previous is None else f"step {previous} stays the latest"


def _reason(error: BaseException) -> str:
    if "inline_container" in str(error):  # what torch says of a short write, instead of the OSError
        return f"a file could not be written whole, as when the disk is full ({str(error).splitlines()[0]})"
    return str(error)
