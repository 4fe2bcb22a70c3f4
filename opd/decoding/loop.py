"""Continuous batched decoding: answers of different lengths share a fixed number of cache rows.

Each distinct prompt is prefilled once and its cache copied to the other answers of the group; a finished answer's row
is given to the next request. Draws depend on (seed, request key) only, never on the batch around a request.

Shape legend: R answers being written, V vocabulary, D uniforms per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from opd.decoding.draws import request_noise
from opd.decoding.ragged_decoder import RaggedDecoder
from opd.types import GenerationRequest, GenerationResult, SampleStatus, SamplingParams

# (logits [R, V] of each model, uniforms [R, D]) -> (token ids [R], behaviour log-probs [R] in nats)
Draw = Callable[[list[torch.Tensor], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Answer:
    """One answer being written in one row of the caches."""

    request: GenerationRequest
    noise_DL: torch.Tensor  # L: response tokens at most
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        return len(self.ids) == self.noise_DL.shape[1]

    @property
    def last_token(self) -> tuple[int, int]:
        """(id, position)."""
        return self.ids[-1], len(self.request.prompt_ids) + len(self.ids) - 1


@torch.inference_mode()
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
    """Yields each answer as it ends: at a stop token, ``max_new_tokens`` or ``max_context_len``.

    Args:
        models: advance together over every answer; ``draw`` gets the logits of all of them.
        draws_per_token: uniforms that ``draw`` gets for each token.
        max_context_len: tokens of prompt and answer.

    Raises:
        ValueError: a prompt that leaves no room for an answer.
    """
    if not requests:
        return
    longest = max(len(r.prompt_ids) for r in requests)
    if longest >= max_context_len:
        raise ValueError(f"a prompt of {longest} tokens leaves no room for an answer within {max_context_len} tokens")

    def limit(request: GenerationRequest) -> int:
        return min(params.max_new_tokens, max_context_len - len(request.prompt_ids))

    def start(request: GenerationRequest) -> _Answer:
        noise = request_noise(params.seed, request.key, draws_per_token * limit(request))
        return _Answer(request=request, noise_DL=noise.view(draws_per_token, -1))

    waiting = deque(requests)
    count = min(max_running_requests, len(requests))
    capacity = max(len(r.prompt_ids) + limit(r) for r in requests)
    decoders = [RaggedDecoder(model, rows=count, capacity=capacity) for model in models]
    running: dict[int, _Answer] = {}  # cache row -> answer
    free = list(reversed(range(count)))
    stop = frozenset(params.stop_token_ids)
    while waiting or running:
        admitted = {free.pop(): start(waiting.popleft()) for _ in range(min(len(free), len(waiting)))}
        logits = [_next_logits(decoder, running, admitted) for decoder in decoders]
        running |= admitted
        uniforms_RD = torch.stack([a.noise_DL[:, len(a.ids)] for a in running.values()]).to(logits[0].device)
        ids_R, logprobs_R = draw(logits, uniforms_RD)
        tops = logits[0].topk(params.top_ids).indices.tolist() if params.top_ids else [None] * len(running)
        for (row, answer), token, logprob, top in zip(
            list(running.items()), ids_R.tolist(), logprobs_R.tolist(), tops, strict=True
        ):
            answer.ids.append(token)
            answer.log_probs.append(logprob)
            if top is not None:
                answer.top_ids.append(top)
            if token in stop or answer.is_full:
                del running[row]
                free.append(row)
                yield _result(answer, ended=token in stop, weight_version=weight_version)


def _next_logits(decoder: RaggedDecoder, running: dict[int, _Answer], admitted: dict[int, _Answer]) -> torch.Tensor:
    """Logits [R, V] for the next token of the running answers, then of the admitted ones."""
    parts = []
    if running:
        parts.append(decoder.append({row: answer.last_token for row, answer in running.items()}))
    if admitted:
        parts.append(decoder.prefill({row: answer.request.prompt_ids for row, answer in admitted.items()}))
    return torch.cat(parts)


def _result(answer: _Answer, *, ended: bool, weight_version: int) -> GenerationResult:
    return GenerationResult(
        key=answer.request.key,
        response_ids=answer.ids,
        log_probs=answer.log_probs,
        status=SampleStatus.COMPLETED if ended else SampleStatus.TRUNCATED,
        weight_version=weight_version,
        top_ids=answer.top_ids or None,
    )
