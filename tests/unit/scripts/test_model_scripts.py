"""scripts/models/*.sh: each sources, parses with our flags, and gives the known number of parameters."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from opd.config.flags import parse_flags
from opd.config.model_facts import ModelFacts
from opd.config.schema import ModelFlags

FOLDER = Path(__file__).parents[3] / "scripts" / "models"
PARAMETERS = {
    "qwen2.5-0.5B": 494_032_768,
    "qwen2.5-1.5B": 1_543_714_304,
    "qwen2.5-3B": 3_085_938_688,
    "qwen2.5-7B": 7_615_616_512,
    "qwen2.5-14B": 14_770_033_664,
    "qwen2.5-32B": 32_763_876_352,
    "qwen3-0.6B": 596_049_920,
    "qwen3-1.7B": 1_720_574_976,
    "qwen3-4B": 4_022_468_096,
    "qwen3-8B": 8_190_735_360,
    "qwen3-14B": 14_768_307_200,
    "qwen3-32B": 32_762_123_264,
    "llama3.2-1B": 1_235_814_400,
    "llama3.2-3B": 3_212_749_824,
    "llama3.1-8B": 8_030_261_248,
    "smollm2-135M": 134_515_008,
    "smollm2-360M": 361_821_120,
}
ROTARY_BASE = {"qwen": 1_000_000.0, "llama": 500_000.0, "smollm2": 100_000.0}


def model_args(name: str, environ: dict[str, str] | None = None) -> list[str]:
    code = f'set -euo pipefail; source "{FOLDER / name}.sh"; printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    ended = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, env=environ)
    return ended.stdout.splitlines()


def facts_of(model: ModelFlags) -> ModelFacts:
    """The facts that a config.json with the flags' shape would give."""
    return ModelFacts(
        source=FOLDER,
        family="",
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        vocab_size=model.vocab_size,
        max_position_embeddings=1,
        norm_epsilon=model.norm_epsilon or 0.0,
        rotary_base=model.rotary_base,
        use_rope_scaling=model.use_rope_scaling,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
    )


def test_every_script_has_a_known_count() -> None:
    assert {path.stem for path in FOLDER.glob("*.sh")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_script(name: str) -> None:
    model = parse_flags(model_args(name)).model
    assert facts_of(model).parameter_count == PARAMETERS[name]
    family = next(prefix for prefix in ROTARY_BASE if name.startswith(prefix))
    assert model.rotary_base == ROTARY_BASE[family]
    assert model.add_qkv_bias == name.startswith("qwen2.5")
    assert model.qk_layernorm == name.startswith("qwen3")
    assert model.use_rope_scaling == name.startswith("llama")
    assert model.swiglu and model.disable_bias_linear and model.group_query_attention
    assert model.norm_epsilon == {"qwen": 1e-6}.get(family, 1e-5) or name in ("qwen2.5-14B", "qwen2.5-32B")


def test_the_2507_models_rope_base() -> None:
    args = model_args("qwen3-4B", {"PATH": "/usr/bin:/bin", "MODEL_ARGS_ROTARY_BASE": "5000000"})
    assert parse_flags(args).model.rotary_base == 5_000_000.0
