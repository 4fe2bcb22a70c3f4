"""A frozen Megatron teacher beside the student: any size, same vocabulary, no gradients, no optimizer.

Its weights wait in host memory and visit the device for each scoring pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ColoadedTeacher:
    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model.eval().requires_grad_(False)
        self._device = next(model.parameters()).device
        self._park()

    @contextmanager
    def on_device(self) -> Iterator[torch.nn.Module]:
        """The teacher, ready to score, for the length of the block."""
        self._model.to(self._device)
        try:
            yield self._model
        finally:
            self._park()

    def _park(self) -> None:
        if self._device.type != "cpu":
            self._model.to("cpu")
            torch.cuda.empty_cache()
