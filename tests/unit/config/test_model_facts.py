"""Parameter counts against transformers, and config.json as transformers 4 and 5 write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd.config.flags import ConfigError
from opd.config.layout import RankLayout
from opd.config.model_facts import ModelFacts, find_hf_config, read_model_facts
from opd.config.parameters import parameters_on_stage

from .conftest import TINY, write_model

TINY_VARIANTS: list[dict[str, Any]] = [
    {"model_type": "qwen3"},
    {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 16},
    {"model_type": "qwen3", "head_dim": None},  # transformers' default of 128, not hidden / heads
    {"model_type": "qwen2", "head_dim": None},
    {"model_type": "qwen2", "head_dim": None, "tie_word_embeddings": False},
    {"model_type": "llama"},
    {"model_type": "llama", "head_dim": None, "num_key_value_heads": None},
    {"model_type": "llama", "tie_word_embeddings": None},
    {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
]


@pytest.mark.parametrize("changes", TINY_VARIANTS, ids=str)
def test_count_and_shape_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from opd.torchvision_ops import define_missing_ops

    define_missing_ops()
    write_model(tmp_path / "m", **changes)
    facts = read_model_facts(str(tmp_path / "m"), flag="--hf-checkpoint")
    hf = AutoConfig.from_pretrained(tmp_path / "m")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    assert facts.parameter_count == model.num_parameters()
    names = [name for name, _ in model.named_parameters()]
    assert facts.add_qkv_bias == any("q_proj.bias" in name for name in names)
    assert facts.qk_layernorm == any("q_norm" in name for name in names)
    assert facts.kv_channels * facts.num_query_groups == model.model.layers[0].self_attn.k_proj.weight.shape[0]
    assert facts.rotary_base == hf.rope_parameters["rope_theta"]


def test_config_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0}
    write_model(tmp_path / "m", model_type="llama", rope_parameters=None, rope_theta=500000.0, rope_scaling=scaling)
    facts = read_model_facts(str(tmp_path / "m"), flag="--hf-checkpoint")
    assert facts.rotary_base == 500000.0
    assert facts.use_rope_scaling


def test_a_converted_checkpoint_keeps_its_config_in_hf(tmp_path: Path) -> None:
    write_model(tmp_path / "torch_dist" / "hf")
    assert find_hf_config(str(tmp_path / "torch_dist")) == tmp_path / "torch_dist" / "hf" / "config.json"
    assert read_model_facts(str(tmp_path / "torch_dist"), flag="--f").num_layers == TINY["num_hidden_layers"]


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither config.json nor hf/config.json"):
        read_model_facts(str(tmp_path), flag="--hf-checkpoint")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"mlp_bias": True},
        {"attention_bias": True},
        {"attention_dropout": 0.1},
        {"partial_rotary_factor": 0.5},
        {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
        {"hidden_size": "64"},
    ],
    ids=str,
)
def test_models_that_cannot_be_built_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_model(tmp_path / "m", **changes)
    key = list(changes)[-1]
    with pytest.raises(ConfigError, match=key):
        read_model_facts(str(tmp_path / "m"), flag="--hf-checkpoint")


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="is not a JSON object"):
        read_model_facts(str(tmp_path), flag="--hf-checkpoint")


def facts_of(**changes: Any) -> ModelFacts:
    shape = {
        "source": Path("."), "family": "qwen3", "num_layers": 4, "hidden_size": 8, "ffn_hidden_size": 12,
        "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 6, "vocab_size": 10,
        "max_position_embeddings": 32, "norm_epsilon": 1e-6, "rotary_base": 1e4, "use_rope_scaling": False,
        "add_qkv_bias": False, "qk_layernorm": True, "untie_embeddings_and_output_weights": False,
    }  # fmt: skip
    return ModelFacts(**{**shape, **changes})


def of_rank(facts: ModelFacts, *, tp: int = 1, pp: int = 1, stage: int = 0, vocab_multiple: int = 1) -> int:
    layout = RankLayout(world=tp * pp, tp=tp, pp=pp, etp=tp)
    return parameters_on_stage(facts, layout, stage=stage, vocab_multiple=vocab_multiple).total


def test_parameters_of_a_rank_by_hand() -> None:
    facts = facts_of()
    # A layer: Q 8x24, K and V 8x12 each, output 24x8 = 576; MLP 3 x 8x12 = 288; norms 2x8 + 2x6 = 28.
    assert facts.layer_parameters == 576 + 288 + 28
    assert facts.parameter_count == 4 * 892 + 80 + 8
    assert of_rank(facts) == facts.parameter_count == facts.active_parameter_count
    # TP 2 halves all but the norms; the final norm's 8 are whole.
    assert of_rank(facts, tp=2) == 4 * (432 + 28) + 40 + 8
    # TP 4 pads 10 rows to 12; with a multiple of 8 to 32.
    assert of_rank(facts, tp=4) == 4 * (216 + 28) + 3 * 8 + 8
    assert of_rank(facts, tp=4, vocab_multiple=8) == 4 * (216 + 28) + 8 * 8 + 8
    # PP 2: two layers and the table; the last stage has a copy of it as output matrix, and the final norm.
    assert [of_rank(facts, pp=2, stage=s) for s in (0, 1)] == [2 * 892 + 80, 2 * 892 + 80 + 8]
    assert [of_rank(facts, pp=4, stage=s) for s in (1, 2)] == [892, 892]


def test_parameters_of_a_rank_untied() -> None:
    facts = facts_of(untie_embeddings_and_output_weights=True)
    assert of_rank(facts) == facts.parameter_count == 4 * 892 + 160 + 8
    assert [of_rank(facts, tp=2, pp=2, stage=s) for s in (0, 1)] == [2 * 460 + 40, 2 * 460 + 40 + 8]


def test_experts_by_hand() -> None:
    facts = facts_of(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=6)
    # Instead of the MLP's 288: the router's 4 x 8 and 4 experts of 3 x 8x6.
    assert facts.layer_parameters == 576 + 32 + 576 + 28
    assert facts.parameter_count - facts.active_parameter_count == 4 * 2 * 144
    layout = RankLayout(world=4, tp=2, ep=2, etp=1)
    found = parameters_on_stage(facts, layout, stage=0)
    assert found.experts == 4 * 576 // 2
    assert found.dense == 4 * (576 // 2 + 32 + 28) + 40 + 8  # norms and router are whole
