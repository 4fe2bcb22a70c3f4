"""What a rank holds of a model: a pipeline stage as one GPTModel, or in an interleaved pipeline several."""

from __future__ import annotations

from typing import Any

import torch
from mbridge.core import LLMBridge
from mbridge.core.util import unwrap_model
from megatron.core.models.gpt.gpt_model import GPTModel


class BridgedModel(GPTModel):
    """A GPTModel that knows its bridge: what its parameters are called in the Hugging Face model.

    Attributes:
        applies_head: False: the last pipeline stage returns hidden states [positions, 1, hidden], this rank's under
            sequence parallelism, and the output layer is applied outside (``output_head``), where it is needed.
    """

    bridge: LLMBridge
    applies_head = True

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.post_process and not self.applies_head:
            # The output layer does not run, but its weights are about to be used: DDP's hooks wait for their gathering.
            for hook in self.output_layer._forward_pre_hooks.values():
                hook(self.output_layer, ())
            return hidden_states
        return super()._postprocess(hidden_states, *args, **kwargs)


class ModelParts(torch.nn.Module):
    """What one rank of an interleaved pipeline holds, in the order of the layers. To its users it is a model: config,
    bridge, parameters and checkpoint are the whole rank's, and head and final norm those of the last part."""

    def __init__(self, parts: list[BridgedModel]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        self.running: tuple[torch.nn.Module, ...] = tuple(parts)  # what the schedule calls: in training, DDP's wrappers
        self.config, self.bridge = parts[0].config, parts[0].bridge

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Local names as in ``state_dict``; in the checkpoint the tensors have the names of the whole model."""
        return {
            f"parts.{number}.{name}": value
            for number, part in enumerate(self.parts)
            for name, value in part.sharded_state_dict(*args, **kwargs).items()
        }


def model_parts(model: torch.nn.Module) -> list[BridgedModel]:
    """The GPTModels of this rank: one, or in an interleaved pipeline several."""
    inner = bridged_model(model)
    return list(inner.parts) if isinstance(inner, ModelParts) else [inner]


def bridged_model(model: torch.nn.Module) -> BridgedModel | ModelParts:
    """The model inside DDP and Float16Module."""
    inner = unwrap_model(model)
    if not isinstance(inner, BridgedModel | ModelParts):
        raise TypeError(f"{type(inner).__name__} was not made by build_model")
    return inner
