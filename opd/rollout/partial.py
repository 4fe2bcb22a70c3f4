"""A prompt and its answers while they are written, maybe over several rollouts: ``--partial-rollout``.

An answer that is set aside goes on from its prompt and what is written, as if it had never stopped: its noise follows
from the place of each token. The log-prob of a token stays that of the weights which drew it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opd.data.prompts import Prompt
from opd.types import GenerationRequest, GenerationResult, Sample, SampleStatus

Spans = list[tuple[int, int]]


@dataclass(kw_only=True, eq=False)
class AnswerGroup:
    """
    Attributes:
        first_step: the step whose rollout began it.
    """

    prompt: Prompt
    samples: list[Sample]
    first_step: int

    @property
    def complete(self) -> bool:
        return not self.unfinished

    @property
    def unfinished(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.status is SampleStatus.PENDING]


def new_group(prompt: Prompt, *, first_index: int, count: int, first_step: int = 0) -> AnswerGroup:
    """``count`` answers that are not begun, numbered from ``first_index``."""
    samples = [new_sample(prompt, first_index + i) for i in range(count)]
    return AnswerGroup(prompt=prompt, samples=samples, first_step=first_step)


def new_sample(prompt: Prompt, index: int) -> Sample:
    """Groups get their numbers when they are written."""
    return Sample(
        index=index,
        group_index=0,
        prompt=prompt.text,
        tokens=list(prompt.ids),
        label=prompt.label,
        metadata=dict(prompt.metadata),
        teacher_index=prompt.teacher_index,
        teacher_prompt_ids=None if prompt.teacher_ids is None else list(prompt.teacher_ids),
    )


def request_for(prompt: Prompt, sample: Sample) -> GenerationRequest:
    """For what is still to be written of ``sample``."""
    with_teacher = prompt.mixture_ids
    return GenerationRequest(
        key=sample.index,
        prompt_ids=tuple(sample.tokens),
        written=sample.response_length,
        teacher_prompt_ids=None if with_teacher is None else (*with_teacher, *sample.response_ids),
    )


def continue_with(sample: Sample, result: GenerationResult) -> None:
    """Puts what was written behind what there was; the text and the reward are left to the caller."""
    sample.status = result.status
    if sample.response_length == 0:
        sample.rollout_log_probs = result.log_probs
        sample.student_top_ids = result.top_ids
        sample.weight_version = result.weight_version
        sample.weight_spans = result.weight_spans
    elif result.response_ids:
        sample.rollout_log_probs = [*(sample.rollout_log_probs or ()), *result.log_probs]
        if sample.student_top_ids is not None and result.top_ids is not None:
            sample.student_top_ids = torch.cat([sample.student_top_ids, result.top_ids])
        sample.weight_spans = _joined_spans(sample, result)
        sample.weight_version = result.weight_version
    sample.tokens = [*sample.tokens, *result.response_ids]
    sample.response_length += len(result.response_ids)


def _joined_spans(sample: Sample, result: GenerationResult) -> Spans | None:
    """(first response token, version) of each stretch of the whole answer; None when an engine does not say."""
    before = sample.weight_spans or _whole(sample.weight_version)
    after = result.weight_spans or _whole(result.weight_version)
    if not before or not after:
        return None
    spans = list(before)
    for start, version in after:
        if version != spans[-1][1]:
            spans.append((sample.response_length + start, version))
    return spans


def _whole(version: int | None) -> Spans:
    return [] if version is None else [(0, version)]


def number_groups(groups: Sequence[AnswerGroup]) -> None:
    """From 0 in this order."""
    for number, group in enumerate(groups):
        for sample in group.samples:
            sample.group_index = number


def mask_earlier_tokens(samples: Sequence[Sample], earlier: dict[int, int]) -> None:
    """--mask-offpolicy-in-partial-rollout: no loss counts what earlier rollouts wrote.

    Args:
        earlier: by sample index, the response tokens that were there before this rollout.
    """
    for sample in samples:
        if count := earlier[sample.index]:
            sample.loss_mask = [0] * count + [1] * (sample.response_length - count)


def partial_metrics(
    batch: Sequence[Sample], groups: Sequence[AnswerGroup], earlier: dict[int, int], *, step: int, rounds: int
) -> dict[str, float]:
    """
    Args:
        batch: samples of the groups that leave.
        groups: all that were in flight in this rollout.
        earlier: see ``mask_earlier_tokens``.
        rounds: see ``RolloutDriver.write``.
    """
    tokens = sum(sample.response_length for sample in batch)
    return {
        "partial_share": sum(earlier[sample.index] for sample in batch) / max(tokens, 1),
        "partial_unfinished": float(sum(len(group.unfinished) for group in groups)),
        "partial_oldest": float(max((step - group.first_step for group in groups), default=0)),
        "partial_rounds": float(rounds),
    }
