"""What a checkpoint holds of a model with low-rank adapters: the adapters and what they are, without the frozen base.

The base comes from --hf-checkpoint or --ref-load on every start, before the adapters are added and loaded.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from opd.megatron_backend.checkpoint_index import read_common
from opd.megatron_backend.checkpoint_layout import CheckpointError
from opd.megatron_backend.hf_bridge import bridged_model
from opd.megatron_backend.lora import ADAPTER_PARAMETERS, AdapterSpec, adapter_spec

_KEY = "adapters"


def trainable_state(model: torch.nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """The sharded state to save or load: the whole model, or with adapters the adapters alone."""
    state = bridged_model(model).sharded_state_dict(metadata=metadata)
    if adapter_spec(model) is None:
        return state
    return {key: value for key, value in state.items() if key.endswith(ADAPTER_PARAMETERS)}


def adapter_parts(model: torch.nn.Module) -> dict[str, Any]:
    """For the part of a checkpoint that is equal on every rank: rank, scale and place of the adapters, if any."""
    spec = adapter_spec(model)
    return {} if spec is None else {_KEY: asdict(spec) | {"target_modules": list(spec.target_modules)}}


def check_adapters(path: Path, model: torch.nn.Module | None) -> bool:
    """Whether the checkpoint holds adapters, after the check that the model is to load what it holds. None: whole
    weights. A wrong --lora-alpha would otherwise load without a word and compute something else.

    Raises:
        CheckpointError: whole weights for a model with adapters, adapters for one without, or other adapters.
    """
    built, saved = None if model is None else adapter_spec(model), _saved_spec(path)
    if saved == built:
        return saved is not None
    if saved is None:
        raise CheckpointError(
            f"checkpoint `{path}` holds whole weights and no adapters. Give it with --ref-load to train adapters on "
            "it, or drop --lora-rank."
        )
    if built is None:
        raise CheckpointError(
            f"checkpoint `{path}` holds low-rank adapters without the weights they belong to. Resume it with "
            f"`{saved.flags()}` and the same base, or take the PEFT adapter of the run that saved it."
        )
    raise CheckpointError(
        f"checkpoint `{path}` holds other adapters than `{built.flags()}`. Resume it with `{saved.flags()}`."
    )


def _saved_spec(path: Path) -> AdapterSpec | None:
    plain = read_common(path).get(_KEY)
    return None if plain is None else AdapterSpec(**plain | {"target_modules": tuple(plain["target_modules"])})
