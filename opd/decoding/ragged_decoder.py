"""One transformers model with the key/value cache of the answers it writes (or, as a teacher, reads along).

Shape legend: R rows in use, U distinct prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from opd.decoding.kv_cache import RaggedKVCache
from opd.errors import UserError

PREFILL_TOKENS = 16_384  # of one forward pass, padding included
LEAST_FILL = 0.75  # of a padded row: prompts that are shorter go into the next pass


class RaggedDecoder:
    """
    Args:
        rows: answers at the same time.
        capacity: tokens of prompt and answer in one row.

    Raises:
        UserError: a model whose attention this cache cannot serve.
    """

    def __init__(self, model: nn.Module, *, rows: int, capacity: int) -> None:
        check_full_attention(model.config)
        self._model = model
        weight = model.get_input_embeddings().weight
        self.device = weight.device
        self._cache = RaggedKVCache(
            model.config, rows=rows, capacity=capacity, dtype=weight.dtype, device=weight.device
        )

    def prefill(self, prompts: Mapping[int, tuple[int, ...]]) -> None:
        """Reads the prompt of each cache row, all but its last token: that one starts the answer.

        Equal prompts are computed once and their cache copied; prompts of about one length share a pass.
        """
        first_row: dict[tuple[int, ...], int] = {}
        for row, prompt in prompts.items():
            first_row.setdefault(prompt[:-1], row)
        for group in _by_length([prompt for prompt in first_row if prompt]):
            self._read(group, [first_row[prompt] for prompt in group])
        copies = [(first_row[p[:-1]], row) for row, p in prompts.items() if first_row[p[:-1]] != row and len(p) > 1]
        if copies:
            source_R, target_R = self._tensor(copies).unbind(1)
            self._cache.copy_rows(source_R, target_R, max(map(len, first_row)))

    def extend(self, ids_RT: torch.Tensor, starts_R: torch.Tensor, *, visible: int) -> torch.Tensor:
        """Logits [R, T, V] after each of T more tokens in the first R cache rows.

        Args:
            starts_R: position of each row's first new token.
            visible: the largest position among the new tokens, and one.
        """
        positions_RT = starts_R[:, None] + torch.arange(ids_RT.shape[1], device=self.device)
        mask = self._cache.place(len(ids_RT), positions_RT, visible)
        return self._model(
            input_ids=ids_RT,
            position_ids=positions_RT,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).logits

    def move_row(self, source: int, target: int, length: int) -> None:
        """Puts the first ``length`` tokens of one row into another."""
        self._cache.copy_rows(self._tensor([source]), self._tensor([target]), length)

    def clear_row(self, row: int) -> None:
        self._cache.clear_row(row)

    def _read(self, prompts_U: list[tuple[int, ...]], rows_U: list[int]) -> None:
        length = max(map(len, prompts_U))
        padded_UT = [[*prompt, *[0] * (length - len(prompt))] for prompt in prompts_U]  # hidden, then overwritten
        positions_UT = torch.arange(length, device=self.device).expand(len(prompts_U), -1)
        mask = self._cache.place(self._tensor(rows_U), positions_UT, length)
        self._model.model(
            input_ids=self._tensor(padded_UT),
            position_ids=positions_UT,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        )

    def _tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, device=self.device)


def check_full_attention(model_config: Any) -> None:
    """
    Raises:
        UserError: a layer that does not attend to everything before it, or keeps other things than keys and values.
    """
    kinds = set(getattr(model_config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or not hasattr(model_config, "num_key_value_heads"):
        raise UserError(
            f"model type `{model_config.model_type}` (layers: {', '.join(sorted(kinds))}) cannot be decoded in this "
            "process: only plain full attention over keys and values is supported. Serve it with SGLang instead."
        )


def _by_length(prompts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Groups of prompts that fit together into one padded pass."""
    group: list[tuple[int, ...]] = []
    for prompt in sorted(prompts, key=len, reverse=True):
        if group and (len(prompt) < LEAST_FILL * len(group[0]) or (len(group) + 1) * len(group[0]) > PREFILL_TOKENS):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
