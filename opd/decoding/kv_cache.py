"""A static key/value cache in which every row has its own length.

A token's slot is its position in its own sequence, so rows of different lengths need no padding between prompt and
answer, and a row rolls back by moving its position: slots beyond it are masked, then overwritten.

Shape legend: R rows in use, T new tokens per row, K key/value heads, C capacity in tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch


class RaggedKVCache:
    """Passed as ``past_key_values`` to an unmodified transformers decoder with full attention."""

    def __init__(
        self, model_config: Any, *, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        heads = model_config.num_key_value_heads
        head_dim = (
            getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
        )
        shape = (model_config.num_hidden_layers, rows, heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._rows_R1 = torch.empty(0, 1, dtype=torch.long)
        self._positions_RT = torch.empty(0, 0, dtype=torch.long)
        self._visible = 0

    def place(self, rows_R: torch.Tensor, positions_RT: torch.Tensor) -> torch.Tensor:
        """Says where the next forward's tokens go; returns its attention mask, bool [R, 1, T, visible slots]."""
        self._rows_R1 = rows_R[:, None]
        self._positions_RT = positions_RT
        self._visible = int(positions_RT.max()) + 1
        slots = torch.arange(self._visible, device=positions_RT.device)
        return (slots[None, None, :] <= positions_RT[:, :, None])[:, None]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' hook: stores [R, K, T, D] and returns everything visible, [R, K, visible, D]."""
        rows_R = self._rows_R1[:, 0]
        self.keys[layer][self._rows_R1, :, self._positions_RT] = keys.transpose(1, 2)
        self.values[layer][self._rows_R1, :, self._positions_RT] = values.transpose(1, 2)
        return self.keys[layer][rows_R, :, : self._visible], self.values[layer][rows_R, :, : self._visible]

    def get_seq_length(self, *_: Any) -> int:
        return 0  # positions are always given explicitly

    def copy_rows(self, source_R: torch.Tensor, target_R: torch.Tensor, length: int) -> None:
        """Copies the first ``length`` slots of some rows onto others."""
        self.keys[:, target_R, :, :length] = self.keys[:, source_R, :, :length]
        self.values[:, target_R, :, :length] = self.values[:, source_R, :, :length]
