"""Which Hugging Face models have a Megatron counterpart here, and mbridge's bridge of each, adapted.

mbridge holds the name mappings and the QKV / gate-up layouts. ``_Adapted`` changes what differs here, in subclasses of
its bridges (its own classes stay as they are):

- layer names of our spec: separate norms, where Transformer Engine fuses them into the linear layer that follows;
- tied embeddings: mbridge writes the alias of the output layer into a dict shared by all Qwen bridges, so that a tied
  model would break an untied one built later in the same process; here each bridge has its own copy;
- RoPE: transformers 5 keeps ``rope_theta`` in ``rope_parameters``, and Llama 3.1 scaling takes its frequencies from
  transformers itself;
- experts: a dense model may live in groups that were made for another model's experts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from mbridge.core import LLMBridge
from mbridge.core.parallel_states import ParallelStates
from mbridge.models import LLaMABridge, Qwen2Bridge, Qwen3Bridge, Qwen3MoEBridge
from transformers import AutoConfig, PretrainedConfig

from opd.errors import UserError
from opd.megatron_backend.moe import has_experts


class UnsupportedModelError(UserError):
    """A Hugging Face model that this backend cannot represent. The message names what and why."""


def bridge_for(hf_config: PretrainedConfig, *, dtype: torch.dtype, make_vocab_size_divisible_by: int) -> LLMBridge:
    """For the process groups that are in use.

    Raises:
        UnsupportedModelError: see ``check_supported``.
    """
    check_supported(hf_config)
    groups = ParallelStates.get_parallel_state()
    if not has_experts(hf_config):
        groups = dataclasses.replace(groups, ep_size=1, ep_rank=0)
    return _BRIDGES[hf_config.model_type](
        hf_config, dtype=dtype, parallel_states=groups, make_vocab_size_divisible_by=make_vocab_size_divisible_by
    )


def read_hf_config(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Raises:
    FileNotFoundError: no ``config.json`` in ``path``.
    UnsupportedModelError: an architecture or option that has no Megatron counterpart here.
    """
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"`{path}` is no Hugging Face model folder: it has no config.json")
    hf_config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    check_supported(hf_config)
    return hf_config


def check_supported(hf_config: PretrainedConfig) -> None:
    """Raises UnsupportedModelError when a Megatron model of this config would compute something else."""
    kind = hf_config.model_type
    if kind not in _BRIDGES:
        raise UnsupportedModelError(
            f"model type `{kind}` is not supported; supported: {', '.join(sorted(_BRIDGES))} "
            "(Qwen2, Qwen2.5, Qwen3 and Llama families)"
        )
    rules: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("hidden_act", "silu", ("silu",)),
        ("use_sliding_window", False, (False, None)),
        ("mlp_bias", False, (False, None)),
        ("attention_dropout", 0.0, (0, 0.0, None)),
        ("partial_rotary_factor", 1.0, (1, 1.0, None)),
    ]
    if kind != "qwen2":  # Qwen2 has biases in QKV only; this option would add one to the output projection too
        rules.append(("attention_bias", False, (False, None)))
    if kind == "qwen3_moe":
        rules += [("mlp_only_layers", [], ([], None)), ("decoder_sparse_step", 1, (1,))]
    for field, default, allowed in rules:
        value = getattr(hf_config, field, default)
        if value not in allowed:
            raise UnsupportedModelError(f"`{field}={value}` in the {kind} config is not supported (only {default})")
    rope = rope_parameters(hf_config)
    if rope["rope_type"] not in ("default", "llama3"):
        raise UnsupportedModelError(
            f"RoPE type `{rope['rope_type']}` in the {kind} config is not supported (only default and llama3)"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"`partial_rotary_factor={rope['partial_rotary_factor']}` is not supported (only 1.0)"
        )


def rope_parameters(hf_config: PretrainedConfig) -> dict[str, Any]:
    """RoPE settings wherever this version of transformers keeps them: at least ``rope_theta`` and ``rope_type``."""
    found = dict(getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {})
    found.setdefault("rope_theta", getattr(hf_config, "rope_theta", None) or 10000.0)
    found.setdefault("rope_type", found.get("type", "default"))
    return found


class _Adapted:
    """What differs from mbridge; mixed in before one of its bridges."""

    _OUR_NORMS = {
        ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
        ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
    }

    def _adjust_mapping_for_shared_weights(self) -> None:
        self._DIRECT_MAPPING = dict(type(self)._DIRECT_MAPPING)  # type: ignore[attr-defined]
        if self.hf_config.tie_word_embeddings:  # type: ignore[attr-defined]
            self._DIRECT_MAPPING["output_layer.weight"] = "model.embed_tokens.weight"

    def _weight_name_mapping_mcore_to_hf(self, mcore_weights_name: str) -> list[str]:
        for ours, fused in self._OUR_NORMS.items():
            if mcore_weights_name.endswith(ours):
                mcore_weights_name = mcore_weights_name.removesuffix(ours) + fused
        return super()._weight_name_mapping_mcore_to_hf(mcore_weights_name)  # type: ignore[misc]

    def _get_actual_hf_path(self, weight_path: str) -> str:
        return weight_path  # a local folder always: nothing is looked up or downloaded


class _Qwen2(_Adapted, Qwen2Bridge): ...


class _Qwen3(_Adapted, Qwen3Bridge): ...


class _Llama(_Adapted, LLaMABridge): ...


class _Qwen3MoE(_Adapted, Qwen3MoEBridge):
    # The norm before the experts is not fused into anything, here nor in Transformer Engine.
    _OUR_NORMS = {".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight"}

    def _weight_merge_across_tp(
        self, mcore_weights_name: str, mcore_weights: list[torch.Tensor], param: torch.Tensor
    ) -> torch.Tensor:
        # mbridge gathers an expert over the tensor-parallel ranks also where each of them holds all of it.
        if ".mlp.experts." in mcore_weights_name and self.mpu.etp_size == 1:
            return mcore_weights[0]
        return super()._weight_merge_across_tp(mcore_weights_name, mcore_weights, param)


_BRIDGES: dict[str, type[LLMBridge]] = {
    "qwen2": _Qwen2,
    "qwen3": _Qwen3,
    "llama": _Llama,
    "qwen3_moe": _Qwen3MoE,
}
