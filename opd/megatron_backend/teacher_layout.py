"""A co-loaded teacher in a parallel layout of its own, on the student's ranks.

Its groups take the place of the student's while it is built and while it scores (``groups.Layout``). What goes in and
out crosses between the two divisions of the ranks: the samples of all data-parallel shares of the student are shared
out again over the teacher's, and scores come back the same way.

For a distribution loss the student's last pipeline stage applies the teacher's output head itself, on its own slice of
the vocabulary: it gets the teacher's hidden states of its samples after every scoring pass, and its slice of the head
once, when the teacher is built (a teacher with a layout of its own is frozen).

Shape legend: T response tokens, H the teacher's hidden size, V rows of the head on one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from opd.data.batching import MicroBatchLimit, balanced_partition
from opd.maths.head import OutputHead
from opd.megatron_backend.groups import Layout
from opd.megatron_backend.hf_bridge import model_parts, output_head
from opd.megatron_backend.pipeline import current_device
from opd.megatron_backend.response_scores import ResponseScores, response_scores, saved_lengths
from opd.teachers.coloaded_teacher import ColoadedTeacher
from opd.types import TokenBatch

_ROWS_AT_A_TIME = 8192  # of hidden states or of the head, in one broadcast


class RelaidTeacher:
    """A frozen teacher whose layout is not the student's. ``response_scores`` is called by all ranks together."""

    def __init__(
        self,
        layout: Layout,
        build: Callable[[], ColoadedTeacher],
        *,
        limit: MicroBatchLimit,
        head_vocab_multiple: int | None,
    ) -> None:
        """
        Args:
            build: makes the teacher and loads its weights; it runs in ``layout``.
            limit: of its micro-batches.
            head_vocab_multiple: a loss will ask for ``head``: the student's vocabulary is padded to a multiple of this
                on each tensor-parallel rank. None: no loss will.
        """
        self._layout, self._limit = layout, limit
        with layout.in_use():
            self._teacher = build()
            self._sources = _sources()
        self._head = None if head_vocab_multiple is None else self._student_head(head_vocab_multiple)

    def head(self) -> OutputHead:
        """The student's slice of the teacher's output layer, on the device, for as long as the caller keeps it.

        Raises:
            ValueError: on another pipeline stage than the student's last, or when no head was asked for at the start.
        """
        if self._head is None or not mpu.is_pipeline_last_stage():
            raise ValueError("this rank keeps no slice of the teacher's output layer")
        return replace(self._head, weight_VH=self._head.weight_VH.to(current_device()))

    def response_scores(
        self, batch: TokenBatch, *, chunk: int, temperatures: list[float], keep_hidden: bool, likely: int = 0
    ) -> ResponseScores:
        """As ``response_scores.response_scores``, of the student's share ``batch`` of this rank."""
        whole, mine = _all_samples(batch)
        with self._layout.in_use():
            shares = balanced_partition(
                [len(sample.tokens) for sample in whole],
                mpu.get_data_parallel_world_size(),
                list(range(len(whole))),
            )
            share = sorted(shares[mpu.get_data_parallel_rank()])
            # A rank without a sample goes along with one that it drops.
            part = _reading_batch(whole, share or [0])
            with self._teacher.on_device() as model:
                scores = response_scores(
                    model,
                    part,
                    limit=self._limit,
                    chunk=chunk,
                    temperatures=temperatures,
                    keep_hidden=keep_hidden,
                    likely=likely,
                )
            pieces = torch.stack([*scores.logprobs, scores.entropy_T]).split(part.response_lengths, dim=1)
            own = [piece.clone() for piece in pieces]  # a pickled view takes all of its storage along
            values = _from_all_shares(dict(zip(share, own, strict=True)) if share else {})
            found = _from_all_shares(scores.likely if share else {}) if likely else {}
        *logprobs, entropy_T = torch.cat([values[i] for i in mine], dim=1)
        return ResponseScores(
            logprobs=logprobs,
            entropy_T=entropy_T,
            hidden_TH=self._hidden_of(mine, shares, whole, scores.hidden_TH) if keep_hidden else None,
            likely={n: found[i] for n, i in zip(batch.sample_N.tolist(), mine, strict=True) if i in found},
        )

    def _hidden_of(
        self,
        mine: list[int],
        shares: list[list[int]],
        whole: list[_Sample],
        scored_TH: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """[T, H] of this rank's samples, on the student's last stage; every share is sent to all ranks in turn."""
        model = model_parts(self._teacher.model)[-1]
        width, dtype = model.config.hidden_size, model.config.params_dtype
        wanted = set(mine) if mpu.is_pipeline_last_stage() else set()
        found: dict[int, torch.Tensor] = {}
        for number, share in enumerate(shares):
            order = sorted(share)
            lengths = [whole[i].response_length for i in order]
            if not order:
                continue
            source = self._sources[number]
            rows_TH = scored_TH if dist.get_rank() == source else None
            ours = [i for i in order if i in wanted]
            keep_T = torch.tensor([i in wanted for i in order]).repeat_interleave(torch.tensor(lengths))
            kept_TH = _broadcast_rows(rows_TH, keep_T, width, dtype, source)
            found |= dict(zip(ours, kept_TH.split([whole[i].response_length for i in ours]), strict=True))
        return torch.cat([found.pop(i) for i in mine]) if wanted else None

    def _student_head(self, multiple: int) -> OutputHead | None:
        """This rank's rows of the teacher's head, in host memory; None before the student's last stage."""
        with self._layout.in_use(), self._teacher.on_device() as model:
            part = model_parts(model)[-1]
            vocab_size, width, dtype = part.bridge.vocab_size, part.config.hidden_size, part.config.params_dtype
            slices, rows = mpu.get_tensor_model_parallel_world_size(), part.bridge.padded_vocab_size
            rows //= slices
            weight_VH = output_head(model).weight_VH.detach() if mpu.is_pipeline_last_stage() else None
            sources = _ranks_of_slices()
        group = mpu.get_tensor_model_parallel_group()
        own_rows = -(-vocab_size // (multiple * group.size())) * multiple
        first = group.rank() * own_rows
        keep = mpu.is_pipeline_last_stage()
        own_VH = torch.zeros(own_rows, width, dtype=dtype) if keep else None
        for number, source in enumerate(sources):
            begin = number * rows  # in the whole vocabulary
            slice_VH = weight_VH if dist.get_rank() == source else None
            low, high = max(first, begin), min(first + own_rows, begin + rows, vocab_size)
            ours_V = torch.zeros(rows, dtype=torch.bool)
            if keep and low < high:
                ours_V[low - begin : high - begin] = True
            got_VH = _broadcast_rows(slice_VH, ours_V, width, dtype, source)
            if len(got_VH):
                own_VH[low - first : high - first] = got_VH
        if own_VH is None:
            return None
        return OutputHead(weight_VH=own_VH, vocab_size=vocab_size, group=group if group.size() > 1 else None)


class _Sample(NamedTuple):
    """What a scoring pass reads of one."""

    tokens: torch.Tensor  # that the teacher reads
    response_length: int
    saved: bool


def _all_samples(batch: TokenBatch) -> tuple[list[_Sample], list[int]]:
    """The samples of all data-parallel shares, and which of them are this rank's."""
    group = mpu.get_data_parallel_group()
    saved = [length > 0 for length in saved_lengths(batch)]
    own = [_Sample(*row) for row in zip(batch.tokens, batch.response_lengths, saved, strict=True)]
    boxes: list[Any] = [None] * group.size()
    dist.all_gather_object(boxes, own, group=group)
    before = sum(len(box) for box in boxes[: group.rank()])
    return [sample for box in boxes for sample in box], list(range(before, before + len(own)))


def _reading_batch(whole: list[_Sample], share: list[int]) -> TokenBatch:
    """The samples of a share, by their number in ``whole``; what no scoring pass reads is 0."""
    lengths = [whole[i].response_length for i in share]
    zeros_T, zeros_N = torch.zeros(sum(lengths)), torch.zeros(len(share), dtype=torch.long)
    return TokenBatch(
        tokens=[whole[i].tokens for i in share],
        response_lengths=lengths,
        loss_mask_T=zeros_T,
        rollout_logprobs_T=zeros_T,
        outcome_advantages_N=zeros_N.float(),
        teacher_logprobs_T=zeros_T,
        teacher_scored_N=zeros_N.bool(),
        sample_N=torch.tensor(share),
        optimizer_step_N=zeros_N,
        teacher_N=zeros_N,
        off_policy_N=zeros_N.bool(),
        saved_N=torch.tensor([whole[i].saved for i in share]),
    )


def _from_all_shares(own: dict[int, Any]) -> dict[int, Any]:
    """Of every sample, from the data-parallel ranks in use."""
    boxes: list[Any] = [None] * mpu.get_data_parallel_world_size()
    dist.all_gather_object(boxes, own, group=mpu.get_data_parallel_group())
    return {sample: values for box in boxes for sample, values in box.items()}


def _sources() -> list[int]:
    """For each data-parallel share of the layout in use, a rank that ends up with its hidden states."""
    share = mpu.get_data_parallel_rank() if _speaks_for_its_share() else None
    return _ranks_by_number(share)


def _ranks_of_slices() -> list[int]:
    """For each slice of the vocabulary in the layout in use, a rank that holds it."""
    alone = mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    return _ranks_by_number(mpu.get_tensor_model_parallel_rank() if mpu.is_pipeline_last_stage() and alone else None)


def _speaks_for_its_share() -> bool:
    first = mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_context_parallel_rank() == 0
    return first and mpu.is_pipeline_last_stage()


def _ranks_by_number(number: int | None) -> list[int]:
    numbers: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    ranks = {number: rank for rank, number in enumerate(numbers) if number is not None}
    return [ranks[number] for number in sorted(ranks)]


def _broadcast_rows(
    rows_TH: torch.Tensor | None, keep_T: torch.Tensor, width: int, dtype: torch.dtype, source: int
) -> torch.Tensor:
    """The rows of ``source`` that this rank keeps, in host memory; all ranks of the world take part. In pieces, so that
    the device holds few of them at a time.

    Args:
        rows_TH: on ``source``.
        keep_T: bool, for each of its rows.
    """
    kept_KH = torch.empty(int(keep_T.sum()), width, dtype=dtype)
    filled = 0
    for keep in keep_T.split(_ROWS_AT_A_TIME):
        if rows_TH is None:
            piece = torch.empty(len(keep), width, dtype=dtype, device=current_device())
        else:
            piece, rows_TH = rows_TH[: len(keep)].to(current_device(), dtype).contiguous(), rows_TH[len(keep) :]
        dist.broadcast(piece, src=source)
        count = int(keep.sum())
        kept_KH[filled : filled + count] = piece.cpu()[keep]
        filled += count
    return kept_KH
