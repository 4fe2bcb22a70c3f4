"""Samples -> TokenBatch, and TokenBatch -> data-parallel shares and token-budget micro-batches."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch

from opd.errors import EngineError
from opd.types import Sample, TokenBatch


def make_batch(samples: list[Sample], outcome_advantages_N: torch.Tensor, *, samples_per_step: int) -> TokenBatch:
    """The samples that can be trained on, in order. Aborted and empty answers are left out.

    Args:
        outcome_advantages_N: one advantage for each of ``samples``; those left out are not read.
        samples_per_step: global batch size: every so many samples make one optimizer step.

    Raises:
        EngineError: no sample is left.
    """
    kept = [i for i, s in enumerate(samples) if s.trainable]
    if not kept:
        raise EngineError(
            f"none of {len(samples)} samples has a response, so there is nothing to learn from: the rollout engine "
            "aborted all of them. Its log says why; resume with --load when it works"
        )
    chosen = [samples[i] for i in kept]
    lengths = [s.response_length for s in chosen]
    scored = [s.teacher_log_probs is not None for s in chosen]
    teacher_T = torch.cat(
        [
            torch.as_tensor(s.teacher_log_probs).float() if ok else torch.zeros(s.response_length)
            for s, ok in zip(chosen, scored, strict=True)
        ]
    )
    return TokenBatch(
        tokens=[torch.tensor(s.tokens) for s in chosen],
        response_lengths=lengths,
        loss_mask_T=torch.cat([_loss_mask(s) for s in chosen]),
        rollout_logprobs_T=torch.tensor([x for s in chosen for x in s.rollout_log_probs or ()]),
        outcome_advantages_N=outcome_advantages_N[kept].float(),
        teacher_scored_N=torch.tensor(scored),
        sample_N=torch.tensor(kept),
        optimizer_step_N=torch.tensor([i // samples_per_step for i in kept]),
        teacher_logprobs_T=teacher_T,
        teacher_N=torch.tensor([s.teacher_index for s in chosen]),
        off_policy_N=torch.tensor([s.off_policy for s in chosen]),
        teacher_tokens=_teacher_tokens(chosen),
        teacher_span_T=_teacher_spans(chosen),
        saved_N=torch.tensor([s.saved for s in chosen]),
        teacher_likely={
            i: samples[i].teacher_likely for i in kept if samples[i].saved and samples[i].teacher_likely is not None
        },
        **_teacher_top(chosen),
    )


def _loss_mask(sample: Sample) -> torch.Tensor:
    return torch.ones(sample.response_length) if sample.loss_mask is None else torch.tensor(sample.loss_mask).float()


def _teacher_tokens(samples: list[Sample]) -> list[torch.Tensor] | None:
    """What the teacher reads, when any of its prompts differs from the student's. None of a teacher that reads text:
    its ids are no ids of the student's."""
    if all(s.teacher_prompt_ids is None for s in samples) or any(s.teacher_spans is not None for s in samples):
        return None
    return [
        torch.tensor(s.tokens if s.teacher_prompt_ids is None else s.teacher_prompt_ids + s.response_ids)
        for s in samples
    ]


def _teacher_spans(samples: list[Sample]) -> torch.Tensor | None:
    """[T] spans of all samples; an unscored one is in none."""
    if all(s.teacher_spans is None for s in samples):
        return None
    spans = [[-1] * s.response_length if s.teacher_spans is None else s.teacher_spans for s in samples]
    return torch.tensor([number for sample in spans for number in sample])


def _teacher_top(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Kept ids [T, K] and their log-probs, padded to the widest sample with id -1."""
    tops = [s.teacher_top for s in samples if s.teacher_top is not None]
    if not tops:
        return {}
    width = max(top.ids_TK.shape[1] for top in tops)
    ids, logprobs = [], []
    for sample in samples:
        ids_TK = torch.full((sample.response_length, width), -1, dtype=torch.int32)
        logprobs_TK = torch.zeros(sample.response_length, width)
        if sample.teacher_top is not None:
            kept = sample.teacher_top.ids_TK.shape[1]
            ids_TK[:, :kept] = sample.teacher_top.ids_TK
            logprobs_TK[:, :kept] = sample.teacher_top.logprobs_TK
        ids.append(ids_TK)
        logprobs.append(logprobs_TK)
    return {"teacher_top_ids_TK": torch.cat(ids), "teacher_top_logprobs_TK": torch.cat(logprobs)}


def rank_share(batch: TokenBatch, *, rank: int, size: int) -> TokenBatch:
    """What one data-parallel rank of ``size`` works on.

    All ranks take part in every optimizer step: one that a step with fewer samples than ranks has nothing for gets a
    copy of its shortest sample, which counts in no loss and no metric.
    """
    mine, idle = data_parallel_share(batch, rank=rank, size=size), []
    steps_N = batch.optimizer_step_N.tolist()
    for step in sorted(set(steps_N) - {steps_N[i] for i in mine}):
        idle.append(min((i for i, s in enumerate(steps_N) if s == step), key=lambda i: batch.lengths[i]))
    share = batch.select(mine + idle)
    if not idle:
        return share
    counts_N = torch.tensor([True] * len(mine) + [False] * len(idle))
    saved_N = None if share.saved_N is None else share.saved_N & counts_N
    return share.with_(loss_mask_T=share.loss_mask_T * share.per_token(counts_N), saved_N=saved_N)


def data_parallel_share(batch: TokenBatch, *, rank: int, size: int) -> list[int]:
    """Indices of the samples of one rank: within each optimizer step about the same number of tokens for all ranks."""
    mine: list[int] = []
    steps_N = batch.optimizer_step_N.tolist()
    for step in sorted(set(steps_N)):
        members = [i for i, s in enumerate(steps_N) if s == step]
        mine += sorted(balanced_partition([batch.lengths[i] for i in members], size, members)[rank])
    return mine


@dataclass(frozen=True, kw_only=True)
class MicroBatchLimit:
    """How much one micro-batch may hold."""

    tokens: int  # a longer sample stands alone
    samples: int | None = None  # given: this many in the batch's order, however long they are


def micro_batches(lengths: list[int], limit: MicroBatchLimit, *, at_least: int = 1) -> list[list[int]]:
    """Sample indices of each micro-batch: with about equally many tokens each, or ``limit.samples`` in order.

    There are at least ``at_least`` of them, but never more than samples.
    """
    indices = list(range(len(lengths)))
    if limit.samples is not None:
        count = min(len(lengths), max(at_least, -(-len(lengths) // limit.samples)))
        return [indices[i * len(indices) // count : (i + 1) * len(indices) // count] for i in range(count)]
    max_tokens = limit.tokens
    count = max(at_least, -(-sum(lengths) // max_tokens))
    while count < len(lengths):
        parts = balanced_partition(lengths, count, indices)
        if all(len(p) <= 1 or sum(lengths[i] for i in p) <= max_tokens for p in parts):
            return [sorted(p) for p in parts]
        count += 1
    return [[i] for i in indices]


def balanced_partition(lengths: list[int], parts: int, labels: list[int]) -> list[list[int]]:
    """Longest first, each to the part with the fewest tokens so far, fewest members on a tie."""
    result: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, 0, part) for part in range(parts)]  # tokens, members, which
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, members, part = loads[0]
        result[part].append(labels[i])
        heapq.heapreplace(loads, (tokens + lengths[i], members + 1, part))
    return result
