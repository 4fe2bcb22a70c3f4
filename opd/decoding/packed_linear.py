"""Linear layers whose weights are laid out once for small batches, on the CPU.

Decoding multiplies a few rows with large matrices, which is bound by reading them. The default float32 kernels read
them about twice from 4 rows on; with weights prepacked by oneDNN, 1 to 8 rows cost about the same. That makes judging
several drafts as cheap as it can be.
"""

from __future__ import annotations

import psutil
import torch
from torch import nn

LEAST_WEIGHTS = 2**18  # below 1 MiB a matrix is in the cache anyway


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` that also holds its weight packed, for inference. A weight changed in place is packed anew."""

    _packed: torch.Tensor | None = None
    _version = -1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._version != self.weight._version:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 8)
            self._version = self.weight._version
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> int:
    """Turns the model's large linear layers into ``PackedLinear``; returns the bytes that their packed copies take.

    Does nothing (and returns 0) off the CPU, without oneDNN, or where copies would take more than half of the free
    memory. The model must not be trained afterwards: a packed layer has no gradient.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.numel() >= LEAST_WEIGHTS]
    on_cpu = all(layer.weight.device.type == "cpu" and layer.weight.dtype is torch.float32 for layer in layers)
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    if not on_cpu or not torch.backends.mkldnn.is_available() or size > psutil.virtual_memory().available / 2:
        return 0
    for layer in layers:
        layer.__class__ = PackedLinear
    return size
