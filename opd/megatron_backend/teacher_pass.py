"""Scoring by co-loaded teachers: one, several by routing, or several mixed.

For a distribution loss the teachers' last hidden states are kept in host memory, ``T x hidden`` numbers, and their
output heads are applied to a chunk of tokens when the loss needs it: ``T x vocabulary`` logits never exist.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from opd.config.schema import Config
from opd.config.teachers import TeacherSpec, teachers
from opd.maths.entropy import log_softmax, token_entropy
from opd.maths.head import OutputHead
from opd.maths.likely import likely_of_logits
from opd.maths.logprobs import token_logprobs
from opd.megatron_backend.pipeline import MicroBatch, current_device, from_last_stage, micro_batch_limit
from opd.megatron_backend.response_scores import (
    ResponseScores,
    likely_by_sample,
    likely_rows,
    response_scores,
    saved_mask,
)
from opd.megatron_backend.teacher_layout import RelaidTeacher
from opd.types import TokenBatch, TopLogprobs

logger = logging.getLogger(__name__)


class Teacher(Protocol):
    def on_device(self) -> AbstractContextManager[torch.nn.Module]:
        """The model, ready to score, for the length of the block."""

    def head(self) -> OutputHead:
        """Its output layer as it was when it last scored, on the device. Last pipeline stage only."""


class TeacherPass:
    """
    Args:
        teachers: one for each of ``specs``; names that share a checkpoint share the object.
    """

    def __init__(self, config: Config, specs: list[TeacherSpec], teachers: Sequence[Teacher | RelaidTeacher]) -> None:
        self._specs, self._teachers = specs, teachers
        self._mixing = len(specs) > 1 and config.opd.opd_teacher_combine != "route"
        self._mixes_probs = config.opd.opd_teacher_combine == "probs"
        self._keeps_hidden = self.asks_for_heads(config)
        self._likely = config.saved_alternatives
        self._temperature = config.kl_temperature
        self._limit = micro_batch_limit(config.parallel, context_parallel_size=config.parallel.context_parallel_size)
        self._chunk = config.parallel.logits_chunk_tokens
        # teacher -> position of a sample in the rollout -> [its response tokens, hidden]
        self._hidden: list[dict[int, torch.Tensor]] = [{} for _ in specs]
        self._heads: list[OutputHead] | None = None  # on the device from their first use to the end of the update

    @staticmethod
    def asks_for_heads(config: Config) -> bool:
        """Whether the teachers' output heads are applied after the scoring pass: to mix them, or for a distribution
        loss."""
        mixing = len(teachers(config)) > 1 and config.opd.opd_teacher_combine != "route"
        return mixing or config.distillation.distillation_type is not None

    def score(self, batch: TokenBatch) -> TokenBatch:
        """Fills ``teacher_logprobs_T``, ``teacher_entropy_T``, ``teacher_scored_N``, ``teacher_likely``, and
        ``mixed_logprobs_TK`` where teachers are mixed; no gradients. What is not scored is 0."""
        self.forget()
        lengths = batch.response_lengths
        logprobs, entropies = torch.zeros(sum(lengths)), torch.zeros(sum(lengths))
        each: list[torch.Tensor] = []
        likely: dict[int, TopLogprobs] = {}
        for number, teacher in enumerate(self._teachers):
            mine = [i for i, k in enumerate(batch.teacher_N.tolist()) if self._mixing or k == number]
            if not self._any_rank_has(mine):
                continue
            # A data-parallel rank without samples of this teacher goes along with one that it drops.
            part = batch.select(mine or [0])
            scores = self._scores_of(teacher, part.as_teacher_reads())
            if not mine:
                continue
            offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()
            index_T = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in mine])
            logprobs[index_T], entropies[index_T] = scores.logprobs[0], scores.entropy_T
            each.append(scores.logprobs[0])
            likely |= scores.likely
            if scores.hidden_TH is not None:
                pieces = scores.hidden_TH.split(part.response_lengths)
                self._hidden[number] = dict(zip(part.sample_N.tolist(), pieces, strict=True))
        if self._mixing:
            logprobs, entropies = self._score_mixture(batch)
            likely = self._likely_of_mixture(batch)
        columns_TK = torch.stack([logprobs, entropies, *(each if self._mixing else [])], dim=1)
        scored_N = _all_finite(batch, columns_TK)
        columns_TK = columns_TK.masked_fill(~batch.per_token(scored_N)[:, None], 0.0)
        return batch.with_(
            teacher_logprobs_T=columns_TK[:, 0],
            teacher_entropy_T=columns_TK[:, 1],
            teacher_scored_N=scored_N,
            mixed_logprobs_TK=columns_TK[:, 2:] if self._mixing else None,
            teacher_likely=likely,
        )

    def logits_of(self, micro: MicroBatch, *, temperature: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """Row indices [C] into the micro-batch's R rows -> logits [C, V], this rank's slice of the vocabulary, whose
        softmax at ``temperature`` is the teachers' distribution."""
        return self._logits(micro.batch, micro.packed.place_R, temperature)

    def forget(self) -> None:
        """Drops hidden states and heads; the update that used them is done."""
        self._hidden = [{} for _ in self._specs]
        self._heads = None

    def _scores_of(self, teacher: Teacher | RelaidTeacher, batch: TokenBatch) -> ResponseScores:
        options = {"chunk": self._chunk, "temperatures": [self._temperature], "keep_hidden": self._keeps_hidden}
        options["likely"] = 0 if self._mixing else self._likely
        if isinstance(teacher, RelaidTeacher):
            return teacher.response_scores(batch, **options)
        with teacher.on_device() as model:
            return response_scores(model, batch, limit=self._limit, **options)

    def _logits(
        self, batch: TokenBatch, place_R: torch.Tensor, temperature: float
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        device = place_R.device
        if self._heads is None:
            self._heads = [teacher.head() for teacher in self._teachers]
        heads = self._heads
        samples = batch.sample_N.tolist()
        routed_R = batch.per_token(batch.teacher_N).to(device)[place_R]
        hidden = [self._rows(states, samples, batch.response_lengths) if states else None for states in self._hidden]

        def logits(number: int, index_C: torch.Tensor) -> torch.Tensor:
            return heads[number].logits(hidden[number][place_R[index_C].cpu()].to(device))

        def routed(index_C: torch.Tensor) -> torch.Tensor:
            present = routed_R[index_C].unique().tolist()
            if len(present) == 1:
                return logits(present[0], index_C)
            rows_CV = None
            for number in present:
                where_C = routed_R[index_C] == number
                part = logits(number, index_C[where_C])
                rows_CV = part.new_empty(len(index_C), part.shape[1]) if rows_CV is None else rows_CV
                rows_CV[where_C] = part
            return rows_CV

        def mixed(index_C: torch.Tensor) -> torch.Tensor:
            parts = (
                (spec.weight, logits(number, index_C)) for number, spec in enumerate(self._specs) if spec.weight > 0
            )
            return _mix_probs(parts, temperature, heads[0].group) if self._mixes_probs else _mix_logits(parts)

        return mixed if self._mixing else routed

    @staticmethod
    def _rows(states: dict[int, torch.Tensor], samples: list[int], lengths: list[int]) -> torch.Tensor:
        width = next(iter(states.values())).shape[1]
        return torch.cat([
            states[s] if s in states else next(iter(states.values())).new_empty(n, width)
            for s, n in zip(samples, lengths, strict=True)
        ])  # fmt: skip

    def _score_mixture(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = sum(batch.response_lengths)
        result_2T = torch.zeros(2, tokens, device=current_device())
        if mpu.is_pipeline_last_stage():
            everything = torch.arange(tokens, device=current_device())
            logits_of = self._logits(batch, everything, self._temperature)
            ids_T = torch.cat([t[len(t) - n :] for t, n in zip(batch.tokens, batch.response_lengths, strict=True)])
            ids_T = ids_T.to(current_device())
            group = mpu.get_tensor_model_parallel_group()
            options = {"temperature": self._temperature, "group": group if group.size() > 1 else None}
            for index_C in everything.split(self._chunk):
                logits_CV = logits_of(index_C)
                result_2T[0, index_C] = token_logprobs(logits_CV, ids_T[index_C], **options)
                result_2T[1, index_C] = token_entropy(logits_CV, **options)
        logprobs_T, entropy_T = from_last_stage(result_2T).cpu()
        return logprobs_T, entropy_T

    def _likely_of_mixture(self, batch: TokenBatch) -> dict[int, TopLogprobs]:
        """The likeliest tokens of the saved samples, of the distribution that the teachers make together."""
        saved_S = saved_mask(batch).nonzero()[:, 0]
        if self._likely == 0 or not len(saved_S):
            return {}
        device = current_device()
        rows_KS = torch.zeros(2 * self._likely, len(saved_S), dtype=torch.float64, device=device)
        if mpu.is_pipeline_last_stage():
            logits_of = self._logits(batch, torch.arange(sum(batch.response_lengths), device=device), self._temperature)
            group = mpu.get_tensor_model_parallel_group()
            options = {"temperature": self._temperature, "group": group if group.size() > 1 else None}
            pieces = saved_S.to(device).split(self._chunk)
            found = [likely_of_logits(logits_of(index_C), count=self._likely, **options) for index_C in pieces]
            rows_KS = torch.cat([likely_rows(*piece) for piece in found], dim=1)
        return likely_by_sample(batch, from_last_stage(rows_KS))

    @staticmethod
    def _any_rank_has(samples: list[int]) -> bool:
        group = mpu.get_data_parallel_group()
        count = torch.tensor(len(samples), device=current_device())
        if group.size() > 1:
            dist.all_reduce(count, group=group)
        return int(count) > 0


def _all_finite(batch: TokenBatch, columns_TK: torch.Tensor) -> torch.Tensor:
    """[N] False: a model that gave NaN or infinity at one of the sample's tokens has not scored it. It is left out and
    counted, as one that a server could not score."""
    finite_N = torch.stack([rows_LK.isfinite().all() for rows_LK in columns_TK.split(batch.response_lengths)])
    if not finite_N.all():
        counts = int((~finite_N).sum()), len(batch)
        logger.warning("a co-loaded teacher's log-probs are NaN or infinite in %d of %d samples of this rank", *counts)
    return finite_N


Parts = Iterator[tuple[float, torch.Tensor]]  # (weight, logits [C, V])


def _mix_logits(parts: Parts) -> torch.Tensor:
    """Weighted mean of logits: the normalised geometric mean of the distributions, at any temperature."""
    total = None
    for weight, logits_CV in parts:
        scaled = logits_CV.mul_(weight)
        total = scaled if total is None else total.add_(scaled)
    return total.clamp_(min=torch.finfo(total.dtype).min)  # padded columns may have been rounded to -inf


def _mix_probs(parts: Parts, temperature: float, group: dist.ProcessGroup | None) -> torch.Tensor:
    """``temperature * log sum_k w_k softmax(z_k / temperature)``."""
    total = None
    for weight, logits_CV in parts:
        logprobs_CV, _ = log_softmax(logits_CV, temperature=temperature, group=group)
        logprobs_CV.add_(math.log(weight))
        total = logprobs_CV if total is None else torch.logaddexp(total, logprobs_CV)
    return total.mul_(temperature).clamp_(min=torch.finfo(total.dtype).min)
