"""What a Hugging Face ``config.json`` says about a model, read with json alone: transformers takes seconds to import.

Symbols: V vocabulary, H hidden size, F ffn size, D dimensions per head, E experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.config.flags import ConfigError

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
# What transformers assumes when config.json leaves a key out.
_HEAD_DIM_DEFAULT = {"qwen3": 128}
_ROPE_TYPES = ("default", "llama3")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Shape of a decoder; field names are the MODEL flags' where a flag exists.

    A mixture of experts has them in every layer, ``num_experts`` of ``moe_ffn_hidden_size`` each, of which a token
    visits ``moe_router_topk``; all three are 0 in a dense model.
    """

    source: Path
    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    use_rope_scaling: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    untie_embeddings_and_output_weights: bool
    num_experts: int = 0
    moe_router_topk: int = 0
    moe_ffn_hidden_size: int = 0

    @property
    def attention_parameters(self) -> int:
        """Of one layer: Q, K, V and output projections, biases and the per-head norms."""
        q = self.num_attention_heads * self.kv_channels
        kv = self.num_query_groups * self.kv_channels
        weights = self.hidden_size * (q + 2 * kv) + q * self.hidden_size
        bias = (q + 2 * kv) if self.add_qkv_bias else 0
        norms = 2 * self.kv_channels if self.qk_layernorm else 0
        return weights + bias + norms

    @property
    def expert_parameters(self) -> int:
        """Of all experts of one layer; the router, a matrix E x H, is not among them."""
        return self.num_experts * 3 * self.hidden_size * self.moe_ffn_hidden_size

    @property
    def mlp_parameters(self) -> int:
        """Of one layer: gate, up and down projections, or the router and all experts."""
        if self.num_experts:
            return self.num_experts * self.hidden_size + self.expert_parameters
        return 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def layer_parameters(self) -> int:
        return self.attention_parameters + self.mlp_parameters + 2 * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def parameter_count(self) -> int:
        """All trained numbers; a tied output head is not counted twice."""
        tables = 2 if self.untie_embeddings_and_output_weights else 1
        return tables * self.embedding_parameters + self.num_layers * self.layer_parameters + self.hidden_size

    @property
    def active_parameter_count(self) -> int:
        """Those that one token meets: all of a dense model, ``moe_router_topk`` experts per layer of the others."""
        unvisited = self.num_experts - self.moe_router_topk
        return self.parameter_count - self.num_layers * unvisited * 3 * self.hidden_size * self.moe_ffn_hidden_size

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token adds to a KV cache, over all layers."""
        return 2 * self.num_layers * self.num_query_groups * self.kv_channels


def read_model_facts(folder: str, *, flag: str) -> ModelFacts:
    """The facts in ``folder/config.json``, or ``folder/hf/config.json`` of a converted checkpoint.

    Raises:
        ConfigError: naming ``flag``, when there is no config, it is not JSON, lacks a key, or describes a model that
            the trainer cannot build.
    """
    path = find_hf_config(folder)
    shown = f"`{flag}={folder}`"
    if path is None:
        raise ConfigError(
            f"{shown} holds neither config.json nor hf/config.json. Give a Hugging Face model folder, or a checkpoint "
            "made by tools/convert_hf_to_torch_dist.py."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{shown}: {path.name} cannot be read as JSON ({error}). Copy the model folder again."
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{shown}: {path.name} is not a JSON object. Copy the model folder again.")
    _check_supported(raw, shown)
    return _facts(raw, path, shown)


def find_hf_config(folder: str) -> Path | None:
    for candidate in (Path(folder) / "config.json", Path(folder) / "hf" / "config.json"):
        if candidate.is_file():
            return candidate
    return None


def _check_supported(raw: dict[str, Any], shown: str) -> None:
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"{shown}: its config.json has model_type {family!r}, and the trainer builds {', '.join(FAMILIES)}. "
            "Choose a model of one of these families."
        )
    rope_type = _rope(raw).get("rope_type", _rope(raw).get("type", "default"))
    wanted = {
        "hidden_act": (raw.get("hidden_act", "silu"), ("silu",)),
        "rope_type": (rope_type, _ROPE_TYPES),
        "use_sliding_window": (bool(raw.get("use_sliding_window")), (False,)),
        "mlp_bias": (bool(raw.get("mlp_bias")), (False,)),
        "attention_dropout": (raw.get("attention_dropout") or 0.0, (0.0,)),
        "partial_rotary_factor": (
            _rope(raw).get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)),
            (1.0,),
        ),
    }
    if family == "qwen3_moe":  # experts in every layer
        wanted["decoder_sparse_step"] = (raw.get("decoder_sparse_step", 1), (1,))
        wanted["mlp_only_layers"] = (raw.get("mlp_only_layers") or [], ([],))
    if family != "qwen2":  # transformers' Qwen2 has QKV biases always and never reads this key
        wanted["attention_bias"] = (bool(raw.get("attention_bias")), (False,))
    for key, (value, supported) in wanted.items():
        if value not in supported:
            raise ConfigError(
                f"{shown}: its config.json has {key} {value!r}, and the trainer builds only "
                f"{' or '.join(repr(s) for s in supported)}. Choose another model."
            )


def _facts(raw: dict[str, Any], path: Path, shown: str) -> ModelFacts:
    family = raw["model_type"]
    heads = _integer(raw, "num_attention_heads", shown)
    hidden = _integer(raw, "hidden_size", shown)
    groups = heads if raw.get("num_key_value_heads") is None else _integer(raw, "num_key_value_heads", shown)
    if raw.get("head_dim") is not None:
        head_dim = _integer(raw, "head_dim", shown)
    else:
        head_dim = _HEAD_DIM_DEFAULT.get(family, hidden // heads)
    rope = _rope(raw)
    return ModelFacts(
        source=path,
        family=family,
        num_layers=_integer(raw, "num_hidden_layers", shown),
        hidden_size=hidden,
        ffn_hidden_size=_integer(raw, "intermediate_size", shown),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_dim,
        vocab_size=_integer(raw, "vocab_size", shown),
        max_position_embeddings=_integer(raw, "max_position_embeddings", shown),
        norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
        rotary_base=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        use_rope_scaling=rope.get("rope_type", rope.get("type")) == "llama3",
        add_qkv_bias=family == "qwen2",
        qk_layernorm=family in ("qwen3", "qwen3_moe"),
        untie_embeddings_and_output_weights=not raw.get("tie_word_embeddings", False),
        **(_experts(raw, shown) if family == "qwen3_moe" else {}),
    )


def _experts(raw: dict[str, Any], shown: str) -> dict[str, int]:
    count = "num_local_experts" if "num_local_experts" in raw else "num_experts"  # as transformers 5 and 4 write it
    return {
        "num_experts": _integer(raw, count, shown),
        "moe_router_topk": _integer(raw, "num_experts_per_tok", shown),
        "moe_ffn_hidden_size": _integer(raw, "moe_intermediate_size", shown),
    }


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes ``rope_parameters``; 4 wrote ``rope_scaling`` beside ``rope_theta``."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _integer(raw: dict[str, Any], key: str, shown: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = "is missing" if value is None else f"is {value!r}"
        raise ConfigError(f"{shown}: {key} {found} in its config.json, and must be a positive whole number.")
    return value
