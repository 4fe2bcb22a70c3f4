"""One transformers model with the key/value cache of the answers it writes (or, as a teacher, reads along).

Shape legend: R rows in use, U distinct prompts, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from opd.decoding.kv_cache import RaggedKVCache


class RaggedDecoder:
    """
    Args:
        rows: answers at the same time.
        capacity: tokens of prompt and answer in one row.
    """

    def __init__(self, model: nn.Module, *, rows: int, capacity: int) -> None:
        self._model = model
        weight = model.get_input_embeddings().weight
        self._device = weight.device
        self._cache = RaggedKVCache(
            model.config, rows=rows, capacity=capacity, dtype=weight.dtype, device=weight.device
        )

    def prefill(self, prompts: dict[int, tuple[int, ...]]) -> torch.Tensor:
        """Logits [R, V] after the prompt of each cache row. Equal prompts are computed once and their cache copied."""
        first_row: dict[tuple[int, ...], int] = {}
        for row, prompt in prompts.items():
            first_row.setdefault(prompt, row)
        distinct = list(first_row)
        length = max(map(len, distinct))
        ids_UT = torch.zeros(len(distinct), length, dtype=torch.long)
        for i, prompt in enumerate(distinct):
            ids_UT[i, : len(prompt)] = torch.tensor(prompt)  # right padding: hidden by the mask, then overwritten
        positions_UT = torch.arange(length, device=self._device).expand(len(distinct), -1)
        rows_U = self._tensor(list(first_row.values()))
        last_U = self._tensor([len(p) - 1 for p in distinct])
        logits_UV = self._forward(ids_UT.to(self._device), rows_U, positions_UT, last_U)

        source_R = self._tensor([first_row[p] for p in prompts.values()])
        target_R = self._tensor(list(prompts))
        copies_R = source_R != target_R
        if bool(copies_R.any()):
            self._cache.copy_rows(source_R[copies_R], target_R[copies_R], length)
        index = {p: i for i, p in enumerate(distinct)}
        return logits_UV[self._tensor([index[p] for p in prompts.values()])]

    def append(self, tokens: dict[int, tuple[int, int]]) -> torch.Tensor:
        """Logits [R, V] after one more (token, its position) in each cache row."""
        ids_R, positions_R = self._tensor(list(tokens.values())).unbind(1)
        rows_R = self._tensor(list(tokens))
        return self._forward(ids_R[:, None], rows_R, positions_R[:, None], torch.zeros_like(rows_R))

    def _forward(
        self, ids_RT: torch.Tensor, rows_R: torch.Tensor, positions_RT: torch.Tensor, last_R: torch.Tensor
    ) -> torch.Tensor:
        mask = self._cache.place(rows_R, positions_RT)
        hidden_RTH = self._model.model(
            input_ids=ids_RT,
            position_ids=positions_RT,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        hidden_RH = hidden_RTH[torch.arange(len(last_R), device=self._device), last_R]
        return self._model.lm_head(hidden_RH)

    def _tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, device=self._device)
