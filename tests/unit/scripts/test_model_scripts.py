"""scripts/models/*.sh: each sources, parses, and says what its model's Hugging Face config.json says.

``scripts/models/facts/NAME.json`` holds the keys of that config which matter here, with its address and where it was
read.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from opd.config.flags import parse_flags
from opd.config.model_facts import ModelFacts, read_model_facts

FOLDER = Path(__file__).parents[3] / "scripts" / "models"
NAMES = sorted(path.stem for path in FOLDER.glob("*.sh"))
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
    "qwen3-30B-A3B": 30_532_122_624,
    "llama3.2-1B": 1_235_814_400,
    "llama3.2-3B": 3_212_749_824,
    "llama3.1-8B": 8_030_261_248,
    "smollm2-135M": 134_515_008,
    "smollm2-360M": 361_821_120,
}
GIVEN = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "rotary_base", "use_rope_scaling", "add_qkv_bias", "qk_layernorm",
    "untie_embeddings_and_output_weights",
)  # fmt: skip
EXPERTS = ("num_experts", "moe_router_topk", "moe_ffn_hidden_size")


def model_args(name: str, environ: dict[str, str] | None = None) -> list[str]:
    code = f'set -euo pipefail; source "{FOLDER / name}.sh"; printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    ended = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, env=environ)
    return ended.stdout.splitlines()


def known(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "facts" / f"{name}.json").read_text(encoding="utf-8"))


def facts_of(name: str, folder: Path) -> ModelFacts:
    (folder / "config.json").write_text(json.dumps(known(name)["config"]))
    return read_model_facts(str(folder), flag="--hf-checkpoint")


def test_every_script_has_facts_and_a_count() -> None:
    assert set(NAMES) == set(PARAMETERS) == {path.stem for path in (FOLDER / "facts").glob("*.json")}


@pytest.mark.parametrize("name", NAMES)
def test_the_script_says_what_the_config_says(name: str, tmp_path: Path) -> None:
    facts, model = facts_of(name, tmp_path), parse_flags(model_args(name)).model
    assert facts.parameter_count == PARAMETERS[name]
    assert {flag: getattr(model, flag) for flag in GIVEN} == {flag: getattr(facts, flag) for flag in GIVEN}
    assert [getattr(model, flag) or 0 for flag in EXPERTS] == [getattr(facts, flag) for flag in EXPERTS]
    # A script leaves the epsilon out where base and instruct models differ.
    assert model.norm_epsilon == facts.norm_epsilon or name in ("qwen2.5-14B", "qwen2.5-32B")
    assert model.swiglu and model.disable_bias_linear and model.group_query_attention


@pytest.mark.parametrize("name", NAMES)
def test_facts_tell_where_they_come_from(name: str) -> None:
    fact = known(name)
    assert fact["source"] == f"https://huggingface.co/{fact['model']}/blob/main/config.json"
    assert fact["read_in"] and all(address.startswith("https://") for address in fact["read_in"])
    assert fact["model"].rpartition("/")[2].lower().replace("llama-", "llama") == name.lower()


def test_the_2507_models_rope_base() -> None:
    args = model_args("qwen3-4B", {"PATH": "/usr/bin:/bin", "MODEL_ARGS_ROTARY_BASE": "5000000"})
    assert parse_flags(args).model.rotary_base == 5_000_000.0
