"""The models that take part in writing: each reads its own prompt and the answer so far.

Two views of one model (the same weights, two prompts) share one cache of twice the rows, so that both go through the
model in one pass.

Shape legend: R answers being written, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from opd.decoding.ragged_decoder import RaggedDecoder
from opd.types import GenerationRequest


@dataclass(frozen=True, kw_only=True)
class View:
    model: nn.Module
    is_teacher: bool = False  # reads the teacher's prompt where there is one

    def prompt(self, request: GenerationRequest) -> tuple[int, ...]:
        given = request.teacher_prompt_ids if self.is_teacher else None
        return request.prompt_ids if given is None else given


class Views:
    """
    Args:
        views: advance together over every answer.
        rows: answers at the same time.
        capacities: tokens of prompt and answer, per view.
        vocab_size: logits beyond are cut off: heads are padded to different widths.
    """

    def __init__(
        self, views: Sequence[View], *, rows: int, capacities: Sequence[int], vocab_size: int | None = None
    ) -> None:
        self.views = list(views)
        self._vocab_size = vocab_size
        distinct = list({id(view.model): view.model for view in views}.values())
        shared = len(distinct) < len(views)
        if shared and len(distinct) > 1:
            raise ValueError("either every view has its own model, or all share one")
        self._stride = len(views) if shared else 1  # row i of view v is row i * stride + v of a shared cache
        self._decoders = [
            RaggedDecoder(model, rows=rows * self._stride, capacity=max(capacities) if shared else capacity)
            for model, capacity in zip(distinct, capacities, strict=False)
        ]
        self.device = self._decoders[0].device

    def prefill(self, requests: Mapping[int, GenerationRequest]) -> None:
        """Reads each row's prompts, all but their last tokens."""
        prompts: list[dict[int, tuple[int, ...]]] = [{} for _ in self._decoders]
        for v, view in enumerate(self.views):
            mine = prompts[0] if self._stride > 1 else prompts[v]
            mine |= {self._row(row, v): view.prompt(request) for row, request in requests.items()}
        for decoder, rows in zip(self._decoders, prompts, strict=True):
            decoder.prefill(rows)

    def extend(self, v: int, ids_RT: torch.Tensor, starts_R: torch.Tensor, *, visible: int) -> torch.Tensor:
        """Logits [R, T, V] of one view with a model of its own after each of T more tokens; arguments as
        ``RaggedDecoder.extend``."""
        return self._cut(self._decoders[v].extend(ids_RT, starts_R, visible=visible))

    def extend_all(
        self, ids_RS: torch.Tensor, starts_RS: torch.Tensor, *, visible: Sequence[int]
    ) -> list[torch.Tensor]:
        """Logits [R, V] of each of the S views after one more token.

        Args:
            starts_RS: its position in each view.
            visible: per view.
        """
        if self._stride == 1:
            return [
                self.extend(v, ids_RS[:, v, None], starts_RS[:, v], visible=visible[v])[:, 0]
                for v in range(len(self.views))
            ]
        ids = ids_RS.flatten()[:, None]
        logits = self._cut(self._decoders[0].extend(ids, starts_RS.flatten(), visible=max(visible)))
        return list(logits[:, 0].unflatten(0, (-1, self._stride)).unbind(1))

    def move_row(self, source: int, target: int, lengths: Sequence[int]) -> None:
        """Puts one answer into another row; ``lengths``: tokens of each view."""
        for v, length in enumerate(lengths):
            self._decoder(v).move_row(self._row(source, v), self._row(target, v), length)

    def clear_row(self, row: int) -> None:
        """After an answer whose logits were NaN: nothing of it may reach the next one in its row."""
        for v in range(len(self.views)):
            self._decoder(v).clear_row(self._row(row, v))

    def _decoder(self, v: int) -> RaggedDecoder:
        return self._decoders[0 if self._stride > 1 else v]

    def _row(self, row: int, v: int) -> int:
        return row * self._stride + (v if self._stride > 1 else 0)

    def _cut(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self._vocab_size is None else logits[..., : self._vocab_size]
