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
        self._slots = torch.arange(capacity, device=device)
        self._rows = torch.arange(rows, device=device)
        self._read: slice | torch.Tensor = slice(0)
        self._rows_R1 = self._rows[:0, None]
        self._positions_RT = self._rows[:0, None]
        self._visible = 0

    def place(self, rows: int | torch.Tensor, positions_RT: torch.Tensor, visible: int) -> torch.Tensor:
        """Says where the next forward's tokens go; returns its attention mask, bool [R, 1, T, visible slots].

        Args:
            rows: the first so many rows, which are then read in place, or the numbers of others [R], which are copied.
            visible: slots that attention reads: the largest position and one.
        """
        first = isinstance(rows, int)
        self._read = slice(rows) if first else rows
        self._rows_R1 = (self._rows[:rows] if first else rows)[:, None]
        self._positions_RT = positions_RT
        self._visible = visible
        return (self._slots[None, None, :visible] <= positions_RT[:, :, None])[:, None]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' hook: stores [R, K, T, D] and returns everything visible, [R, K, visible, D]."""
        self.keys[layer][self._rows_R1, :, self._positions_RT] = keys.transpose(1, 2)
        self.values[layer][self._rows_R1, :, self._positions_RT] = values.transpose(1, 2)
        return self.keys[layer][self._read, :, : self._visible], self.values[layer][self._read, :, : self._visible]

    def get_seq_length(self, *_: Any) -> int:
        return 0  # positions are always given explicitly

    def copy_rows(self, source_R: torch.Tensor, target_R: torch.Tensor, length: int) -> None:
        """Copies the first ``length`` slots of some rows onto others."""
        self.keys[:, target_R, :, :length] = self.keys[:, source_R, :, :length]
        self.values[:, target_R, :, :length] = self.values[:, source_R, :, :length]

    def clear_row(self, row: int) -> None:
        """For a row that holds NaN: attention multiplies masked values by 0, which would hand it on."""
        self.keys[:, row] = 0
        self.values[:, row] = 0
