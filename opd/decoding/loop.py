"""Continuous batched decoding: answers of different lengths share a fixed number of cache rows.

A finished answer's row is given to the next request; the answers in progress are always in the first rows, so that a
forward pass reads the caches in place. Noise depends on (seed, request key, position) only, never on the batch around a
request.

Shape legend: R answers being written, V vocabulary, D uniforms per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from opd.decoding.draws import request_noise
from opd.decoding.views import View, Views
from opd.types import GenerationRequest, GenerationResult, SampleStatus, SamplingParams

# (logits [R, V] of each model, uniforms [R, D]) -> (token ids [R], behaviour log-probs [R] in nats)
Draw = Callable[[list[torch.Tensor], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(kw_only=True)
class Answer:
    """One answer being written. ``columns``: fields of ``GenerationResult`` with one entry per token."""

    request: GenerationRequest
    prompt_lengths: list[int]  # of each view, tokens
    prompt_ends: list[int]  # last token of each view's prompt
    limit: int  # response tokens at most, in this call
    pauses: bool  # at the limit the answer has room for more
    noise_LD: np.ndarray
    ids: list[int] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def last_tokens(self) -> list[int]:
        """What each view reads next."""
        return [self.ids[-1]] * len(self.prompt_ends) if self.ids else self.prompt_ends

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt and answer in each view."""
        return [length + len(self.ids) for length in self.prompt_lengths]

    def uniforms(self, count: int) -> np.ndarray:
        """[count, D] of the next tokens."""
        return self.noise_LD[len(self.ids) : len(self.ids) + count]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What a round adds to one answer; with ``error`` the answer ends there."""

    ids: list[int]
    columns: dict[str, list[Any]]
    error: str | None = None


class Writer(Protocol):
    """How tokens are chosen. A round may add several to each answer.

    Attributes:
        views: the models; their caches live as long as one ``write`` call.
        draws_per_token: uniforms that each token may use.
        lookahead: tokens beyond an answer's end that a round may touch.
    """

    views: Sequence[View]
    draws_per_token: int
    lookahead: int

    def advance(self, caches: Views, answers: list[Answer]) -> list[Chunk]: ...


@torch.inference_mode()
def write(
    writer: Writer,
    requests: list[GenerationRequest],
    params: SamplingParams,
    *,
    max_running_requests: int,
    max_context_lens: Sequence[int],
    weight_version: int,
    vocab_size: int | None = None,
) -> Iterator[GenerationResult]:
    """Yields each answer as it ends: at a stop token, ``max_new_tokens`` or where a view has no more positions; or, as
    PENDING, after ``pause_after`` tokens.

    Args:
        max_context_lens: tokens of prompt and answer in each view.

    Raises:
        ValueError: a prompt that leaves no room for an answer, or has no tokens.
    """
    if not requests:
        return
    waiting = deque(_start(writer, request, params, max_context_lens) for request in requests)
    rows = min(max_running_requests, len(waiting))
    capacities = [
        max(answer.prompt_lengths[v] + answer.limit for answer in waiting) + writer.lookahead
        for v in range(len(writer.views))
    ]
    caches = Views(writer.views, rows=rows, capacities=capacities, vocab_size=vocab_size)
    running: list[Answer] = []  # by cache row
    stop = frozenset(params.stop_token_ids)
    while waiting or running:
        admitted = [waiting.popleft() for _ in range(min(rows - len(running), len(waiting)))]
        if admitted:
            caches.prefill({len(running) + i: answer.request for i, answer in enumerate(admitted)})
            running += admitted
        finished = {}
        for row, (answer, new) in enumerate(zip(running, writer.advance(caches, running), strict=True)):
            ended = _append(answer, new, stop)
            if ended or new.error is not None or len(answer.ids) == answer.limit:
                finished[row] = _result(answer, new.error, ended=ended, weight_version=weight_version)
            if new.error is not None:
                caches.clear_row(row)
        _close_gaps(caches, running, set(finished))
        yield from finished.values()


def write_answers(
    models: Sequence[nn.Module],
    requests: list[GenerationRequest],
    params: SamplingParams,
    draw: Draw,
    *,
    draws_per_token: int = 1,
    max_running_requests: int,
    max_context_len: int,
    weight_version: int,
) -> Iterator[GenerationResult]:
    """``write`` with models that advance together, one token at a time, and all read the same prompt.

    Args:
        draw: chooses the tokens; gets the logits of all models.
        draws_per_token: uniforms that ``draw`` gets for each token.
    """
    return write(
        LockStep([View(model=model) for model in models], _with_top_ids(draw, params.top_ids), draws_per_token),
        requests,
        params,
        max_running_requests=max_running_requests,
        max_context_lens=[max_context_len] * len(models),
        weight_version=weight_version,
    )


class LockStep:
    """A ``Writer`` that takes one token of every model's logits at a time.

    Args:
        draw: (logits [R, V] of each view, uniforms [R, D]) -> (token ids [R], columns [R, ...] of the answers).
    """

    lookahead = 0

    def __init__(
        self,
        views: Sequence[View],
        draw: Callable[[list[torch.Tensor], torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]],
        draws_per_token: int,
    ) -> None:
        self.views = views
        self.draws_per_token = draws_per_token
        self._draw = draw

    def advance(self, caches: Views, answers: list[Answer]) -> list[Chunk]:
        lengths = [answer.lengths for answer in answers]
        logits = caches.extend_all(
            torch.tensor([answer.last_tokens for answer in answers], device=caches.device),
            torch.tensor(lengths, device=caches.device) - 1,
            visible=[max(column) for column in zip(*lengths, strict=True)],
        )
        uniforms_RD = torch.from_numpy(np.concatenate([answer.uniforms(1) for answer in answers])).to(caches.device)
        ids_R, columns = self._draw(logits, uniforms_RD)
        listed = {name: values.tolist() for name, values in columns.items()}
        return [chunk([token], listed, first=i) for i, token in enumerate(ids_R.tolist())]


def chunk(ids: list[int], columns: dict[str, list[Any]], *, first: int) -> Chunk:
    """Of tokens whose columns begin at place ``first``. A log-prob that is NaN, which can only be the last one's, ends
    the answer: some logit before it was NaN or infinite."""
    mine = {name: values[first : first + len(ids)] for name, values in columns.items()}
    for name, whose in (("student_log_probs", "student's "), ("teacher_log_probs", "teacher's "), ("log_probs", "")):
        if mine.get(name, ids)[-1] != mine.get(name, ids)[-1]:
            return Chunk(ids=ids, columns=mine, error=f"the {whose}logits of its next token are NaN or infinite")
    return Chunk(ids=ids, columns=mine)


def _with_top_ids(draw: Draw, count: int) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    def with_columns(logits: list[torch.Tensor], uniforms_RD: torch.Tensor) -> tuple[torch.Tensor, dict]:
        ids_R, logprobs_R = draw(logits, uniforms_RD)
        columns = {"log_probs": logprobs_R}
        if count:
            columns["top_ids"] = logits[0].topk(count).indices
        return ids_R, columns

    return with_columns


def _start(
    writer: Writer, request: GenerationRequest, params: SamplingParams, max_context_lens: Sequence[int]
) -> Answer:
    prompts = [view.prompt(request) for view in writer.views]
    lengths = [len(prompt) for prompt in prompts]
    problem = prompt_problem(lengths, max_context_lens)
    if problem is not None:
        raise ValueError(problem)
    context_left = min(m - length for m, length in zip(max_context_lens, lengths, strict=True))
    limit, pauses = params.room(request.written, context_left=context_left)
    count = request.written + limit + writer.lookahead
    noise = [request_noise(params.seed, request.key, count, stream=d) for d in range(writer.draws_per_token)]
    return Answer(
        request=request,
        prompt_lengths=lengths,
        prompt_ends=[prompt[-1] for prompt in prompts],
        limit=limit,
        pauses=pauses,
        noise_LD=np.stack(noise, axis=1)[request.written :],
    )


def prompt_problem(lengths: Sequence[int], max_context_lens: Sequence[int]) -> str | None:
    """Why no answer can be written after prompts of these lengths (in each view), or None."""
    for length, limit in zip(lengths, max_context_lens, strict=True):
        if length == 0:
            return "a prompt has no tokens: there is nothing to start from"
        if length >= limit:
            return f"a prompt of {length} tokens leaves no room for an answer within {limit} tokens"
    return None


def _append(answer: Answer, new: Chunk, stop: frozenset[int]) -> bool:
    """Adds what fits; returns whether a stop token ended the answer."""
    count = min(len(new.ids), answer.limit - len(answer.ids))
    ended = next((i for i, token in enumerate(new.ids[:count]) if token in stop), None)
    count = count if ended is None else ended + 1
    if new.error is not None and ended is None:
        count = min(count, len(new.ids) - 1)  # the last token was drawn from what is no distribution
    answer.ids += new.ids[:count]
    for name, values in new.columns.items():
        answer.columns.setdefault(name, []).extend(values[:count])
    return ended is not None


def _close_gaps(caches: Views, running: list[Answer], finished: set[int]) -> None:
    """Takes finished answers out; the last ones in progress move into their rows."""
    for row in sorted(finished, reverse=True):
        last = running.pop()
        if row < len(running):
            caches.move_row(len(running), row, [length - 1 for length in last.lengths])
            running[row] = last


def _result(answer: Answer, error: str | None, *, ended: bool, weight_version: int) -> GenerationResult:
    top_ids = answer.columns.pop("top_ids", None)
    at_limit = SampleStatus.PENDING if answer.pauses else SampleStatus.TRUNCATED
    status = SampleStatus.COMPLETED if ended else at_limit if error is None else SampleStatus.ABORTED
    return GenerationResult(
        key=answer.request.key,
        response_ids=answer.ids,
        log_probs=answer.columns.pop("log_probs", []),
        status=status,
        weight_version=weight_version,
        error=None if ended else error,
        top_ids=torch.tensor(top_ids, dtype=torch.int32) if top_ids else None,
        **answer.columns,
    )
