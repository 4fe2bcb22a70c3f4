"""The weights of a transformers model under the names that checkpoints and the trainer use.

They differ for a mixture of experts: transformers stacks all experts of a layer in two tensors, where a checkpoint has
three matrices for each expert.
"""

from __future__ import annotations

import re

import torch

_STACKED = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<kind>gate_up_proj|down_proj)")


def under_checkpoint_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with views of each expert's matrices in the place of the stacks: writing to a view fills the model."""
    named: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            named[name] = tensor
            continue
        for number, expert in enumerate(tensor.detach()):
            prefix = f"{stacked['experts']}.{number}"
            if stacked["kind"] == "down_proj":
                named[f"{prefix}.down_proj.weight"] = expert
            else:
                named[f"{prefix}.gate_proj.weight"], named[f"{prefix}.up_proj.weight"] = expert.chunk(2)
    return named
