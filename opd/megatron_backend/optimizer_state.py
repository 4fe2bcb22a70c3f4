"""Optimizer state in a checkpoint: saved by one layout and kind of optimizer, loaded by another.

megatron-core has three kinds here, and each stores the same tensors (moments and fp32 main weights, in the model's
shapes) under its own names and in its own structure:

- fp32: the weights are the main weights, so that none are stored beside them;
- bf16: main weights ``optimizer.state.fp32_param.NAME``, one step count in ``state``;
- distributed: main weights ``optimizer.state.param.NAME``, the step count in the parameter groups.

A load asks for the tensors by the names that the checkpoint has, and gives them to the optimizer that is there in its
own structure. Moments are ``optimizer.state.exp_avg.NAME`` and ``.exp_avg_sq.`` in all three. The distributed one's
tensors are written and read by ``optimizer_shards``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from opd.megatron_backend.checkpoint_layout import CheckpointError
from opd.megatron_backend.optimizer_shards import MOMENTS, STATE, read_shards, shard_pieces
from opd.megatron_backend.torch_dist_files import Piece, TensorFiles

# Optimizer state is stored per parameter, without the layout's traces in its names, so that any layout can load it.
_METADATA_SHARDING = "distrib_optim_sharding_type"
METADATA = {_METADATA_SHARDING: "fully_reshardable", "chained_optim_avoid_prefix": True}

_SHARDING = "param_state_sharding_type"
_STEP = "common_step"


def optimizer_parts(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict
) -> tuple[dict[Any, Any] | None, list[Piece]]:
    """What to save: state for ``save_preprocess``, and pieces of this rank beside it. (None, []) before the first
    optimizer step, when there is no state."""
    kinds = _kinds(optimizer)
    if not any(len(each.optimizer.state) for each in kinds):
        return None, []
    pieces: list[Piece] = []
    states: dict[int, dict[str, Any]] = {}
    for index, each in enumerate(kinds):
        if isinstance(each, DistributedOptimizer):
            states[index] = {**each.state_dict(), _SHARDING: METADATA[_METADATA_SHARDING]}
            pieces += shard_pieces(each, model_state)
        else:
            states[index] = each.sharded_state_dict(model_state, is_loading=False, metadata=dict(METADATA))
    return states if len(kinds) > 1 else states[0], pieces


@dataclass(frozen=True, kw_only=True)
class SavedOptimizer:
    """What ``common.pt`` says of the optimizer whose tensors a checkpoint holds. Learning rate, betas and the like are
    not restored: the flags of this run say them."""

    step: int  # optimizer steps done
    main_weights: Literal["param", "fp32_param"] | None

    @staticmethod
    def of(common: dict[str, Any], path: object) -> SavedOptimizer | None:
        """None: saved before the first optimizer step.

        Raises:
            CheckpointError: the checkpoint holds no optimizer, or its tensors are cut in another way.
        """
        if "optimizer" not in common:
            raise CheckpointError(
                f"checkpoint `{path}` holds no optimizer state. Load its weights alone: --no-load-optim, or --finetune "
                "to start at step 0."
            )
        saved = common["optimizer"]
        if saved is None:
            return None
        # Experts that are cut over ranks have an optimizer of their own; its kind and its steps are the same.
        first = saved[0] if all(isinstance(key, int) for key in saved) else saved
        sharding = first.get(_SHARDING)
        if sharding is None:
            inner, main = (first["optimizer"], "fp32_param") if "optimizer" in first else (first, None)
        elif sharding == METADATA[_METADATA_SHARDING]:
            inner, main = first["optimizer"], "param"
        else:
            raise CheckpointError(
                f"checkpoint `{path}` holds optimizer state cut as `{sharding}`, which fits the layout that wrote it "
                "only. Load its weights alone (--no-load-optim), or save it anew with `fully_reshardable` sharding."
            )
        step = inner.get("state", {}).get(_STEP, inner["param_groups"][0].get("step"))
        return SavedOptimizer(step=int(step), main_weights=main)


def wanted_tensors(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, saved: SavedOptimizer
) -> dict[int, dict[int, dict[str, Any]]]:
    """The tensors to load, by optimizer, parameter and name (``main``, ``exp_avg``, ``exp_avg_sq``); none of a
    distributed optimizer. Makes room for them in the optimizer, which makes it only at its first step otherwise."""
    wanted = {}
    for index, each in enumerate(_kinds(optimizer)):
        if isinstance(each, DistributedOptimizer):
            each._init_optimizer_states_with_dummy_values()
        else:
            wanted[index] = _wanted(each, model_state, saved)
    return wanted


def _wanted(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, saved: SavedOptimizer
) -> dict[int, dict[str, Any]]:
    own = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=dict(METADATA))
    if not isinstance(optimizer, Float16OptimizerWithFloat16Params):
        return {index: _moments(each) for index, each in own["state"].items() if index != _STEP}
    wanted = {index: _moments(each) for index, each in own["optimizer"]["state"].items() if index != _STEP}
    ids = [group["params"].unwrap() for group in own["optimizer"]["param_groups"]]
    for group, weights in zip(ids, own["fp32_from_fp16_params"], strict=True):
        for index, each in zip(group, weights, strict=True) if saved.main_weights is not None else []:
            key = each.key.removeprefix(f"{STATE}.fp32_param.")
            wanted[index]["main"] = replace(each, key=f"{STATE}.{saved.main_weights}.{key}")
    return wanted


def give(
    optimizer: MegatronOptimizer,
    model_state: ShardedStateDict,
    loaded: dict[int, dict[int, dict[str, Any]]],
    saved: SavedOptimizer,
    files: TensorFiles,
) -> None:
    """Puts tensors that were loaded as ``wanted_tensors`` asked, those of a distributed optimizer from ``files``, and
    the step count, into the optimizer. After the model's weights were loaded: they are the main weights where the
    checkpoint holds none.

    Raises:
        KeyError: the checkpoint lacks a tensor.
    """
    for index, each in enumerate(_kinds(optimizer)):
        groups = [{**group, "step": saved.step} for group in each.optimizer.state_dict()["param_groups"]]
        if isinstance(each, DistributedOptimizer):
            each.load_state_dict({"optimizer": {"param_groups": groups}})
            read_shards(each, model_state, files, main_weights=saved.main_weights)
        else:
            _give_whole(each, loaded[index], groups, saved)


def _give_whole(
    optimizer: MegatronOptimizer,
    tensors: dict[int, dict[str, Any]],
    groups: list[dict[str, Any]],
    saved: SavedOptimizer,
) -> None:
    """To an optimizer that holds the whole state of this rank's weights."""
    state: dict[Any, Any] = {index: _moments(each) for index, each in tensors.items()}
    if isinstance(optimizer.optimizer, torch.optim.Adam):  # counts for each parameter; fused ones for each group
        state[_STEP] = torch.tensor(float(saved.step))
        groups = [{key: value for key, value in group.items() if key != "step"} for group in groups]
    inner = {"state": state, "param_groups": groups}
    if not isinstance(optimizer, Float16OptimizerWithFloat16Params):
        optimizer.load_state_dict(inner)
        return
    if saved.main_weights is None:
        optimizer.reload_model_params()
        main = optimizer.fp32_from_float16_groups
    else:
        main = [[tensors[index]["main"] for index in group["params"]] for group in groups]
    optimizer.load_state_dict({"optimizer": inner, "fp32_from_fp16_params": main})


def _moments(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensors[name] for name in MOMENTS}


def _kinds(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
