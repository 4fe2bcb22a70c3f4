"""A Megatron model's adapters as a PEFT adapter folder: adapter_config.json and adapter_model.safetensors.

PEFT puts an adapter on each of Hugging Face's linear layers. Megatron's fused layers have one adapter for three (q, k,
v) or two (gate, up) of them: they share A, and B is cut by rows as the weight is, so that both compute the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mbridge.core import LLMBridge
from megatron.core import parallel_state as mpu
from safetensors.torch import save_file

from opd.megatron_backend.hf_bridge import BridgedModel, bridged_model
from opd.megatron_backend.lora import AdapterError, AdapterSpec, adapted_layers, adapter_spec

_MEGATRON_MODULES = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}


def save_peft_adapter(model: torch.nn.Module, folder: str | Path, *, base_model_name_or_path: str) -> None:
    """Writes the adapters for ``PeftModel.from_pretrained(base, folder)``; all ranks take part, rank 0 writes.

    Args:
        base_model_name_or_path: the base model's Hugging Face name or folder, which PEFT records.

    Raises:
        AdapterError: the model has no adapters.
        OSError: on rank 0, when the files cannot be written.
    """
    spec = adapter_spec(model)
    if spec is None:
        raise AdapterError("the model has no adapters to export: --lora-rank adds them")
    tensors = peft_tensors(model)
    if dist.get_rank() == 0:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        modules = sorted({name.split(".")[-3] for name in tensors})
        config = _peft_config(spec, modules, base_model_name_or_path)
        # A reader never sees half a file, or an old one beside a new one for longer than a rename takes.
        weights, settings = target / "adapter_model.safetensors.tmp", target / "adapter_config.json.tmp"
        save_file(tensors, weights, metadata={"format": "pt"})
        settings.write_text(json.dumps(config, indent=2) + "\n")
        for file in (weights, settings):
            os.replace(file, file.with_suffix(""))


def peft_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole adapters under PEFT's names, on the CPU of rank 0; other ranks get a part or nothing. All take part."""
    bridged = bridged_model(model)
    mine = dict(_stage_tensors(bridged))
    group = mpu.get_pipeline_model_parallel_group()
    if group.size() == 1 or 0 not in dist.get_process_group_ranks(group):
        return mine
    stages: list[dict[str, torch.Tensor]] | None = [{}] * group.size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, stages, dst=0, group=group)
    return {name: tensor for stage in stages or [] for name, tensor in stage.items()}


@torch.no_grad()
def _stage_tensors(bridged: BridgedModel) -> Iterator[tuple[str, torch.Tensor]]:
    bridge = bridged.bridge
    for layer, target, linear in adapted_layers(bridged):
        weight_name = f"decoder.layers.{layer}.{_MEGATRON_MODULES[target]}.weight"
        a, b = (_gather_tensor_parallel(bridge, weight_name, p) for p in (linear.lora_a, linear.lora_b))
        hf_names = bridge._weight_name_mapping_mcore_to_hf(weight_name)
        for hf_name, part in zip(hf_names, _rows_by_module(bridge, target, b), strict=True):
            prefix = f"base_model.model.{hf_name.removesuffix('.weight')}"
            yield f"{prefix}.lora_A.weight", a.cpu().clone()
            yield f"{prefix}.lora_B.weight", part.cpu().clone()


def _gather_tensor_parallel(bridge: LLMBridge, weight_name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole matrix; its rows merge as those of the weight it belongs to."""
    group = mpu.get_tensor_model_parallel_group()
    if not parameter.tensor_model_parallel or group.size() == 1:  # type: ignore[attr-defined]
        return parameter.detach()
    parts = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(parts, parameter.detach().contiguous(), group=group)
    return bridge._weight_merge_across_tp(weight_name, parts, parameter)


def _rows_by_module(bridge: LLMBridge, target: str, b_OR: torch.Tensor) -> list[torch.Tensor]:
    """B of each Hugging Face module in a fused layer, in the order of their names."""
    if target == "linear_fc1":
        return list(b_OR.chunk(2))
    if target != "linear_qkv":
        return [b_OR]
    # One block of rows per key/value head: its query heads, its key, its value.
    config = bridge.config
    head, groups = config.kv_channels, config.num_query_groups
    queries = config.num_attention_heads // groups * head
    blocks = b_OR.view(groups, queries + 2 * head, -1).split([queries, head, head], dim=1)
    return [block.flatten(0, 1) for block in blocks]


def _peft_config(spec: AdapterSpec, modules: list[str], base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
