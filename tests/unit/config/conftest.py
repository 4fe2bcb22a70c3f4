"""Stub models (config.json and an empty weight file), and valid command lines to break one flag at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
NO_TENSORS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file with an empty header
COMMON = {
    "--hf-checkpoint": "student",
    "--prompt-data": "prompts.jsonl",
    "--num-rollout": "10",
    "--rollout-batch-size": "4",
    "--n-samples-per-prompt": "8",
    "--rollout-max-response-len": "64",
    "--output-dir": "out",
}
BASES: dict[str, dict[str, str | None]] = {
    "grpo": {**COMMON, "--rm-type": "exact", "--label-key": "label"},
    "megatron": {**COMMON, "--use-opd": None, "--opd-type": "megatron", "--opd-teacher-load": "teacher"},
    "sglang": {**COMMON, "--use-opd": None, "--opd-type": "sglang", "--rm-url": "http://127.0.0.1:13141/generate"},
}


def write_model(folder: Path, *, weights: bool = True, **changes: object) -> None:
    """A folder with a config.json; a value None removes the key."""
    folder.mkdir(parents=True)
    shape = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(shape))
    if weights:
        (folder / "model.safetensors").write_bytes(NO_TENSORS)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder during the test, so that messages show short paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # that of a test before this one
    for variable in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    write_model(tmp_path / "student")
    write_model(tmp_path / "teacher", num_hidden_layers=4)
    write_model(tmp_path / "config_only", weights=False)
    write_model(tmp_path / "other_vocabulary", vocab_size=1000)
    write_model(tmp_path / "short_teacher", max_position_embeddings=32)
    write_model(tmp_path / "odd_heads", num_attention_heads=3, num_key_value_heads=3)
    write_model(tmp_path / "gpt2", model_type="gpt2")
    write_model(tmp_path / "incomplete", intermediate_size=None)
    write_model(tmp_path / "yarn", rope_parameters={"rope_theta": 1e6, "rope_type": "yarn"})
    write_model(tmp_path / "deep", num_hidden_layers=8)
    write_model(tmp_path / "six", num_hidden_layers=6)
    write_model(
        tmp_path / "experts",
        model_type="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    )
    write_model(tmp_path / "garbled")
    (tmp_path / "garbled" / "config.json").write_text("{")
    write_model(tmp_path / "torch_dist" / "hf")
    (tmp_path / "torch_dist" / "iter_0000007").mkdir()
    (tmp_path / "torch_dist" / "latest_checkpointed_iteration.txt").write_text("7")
    (tmp_path / "no_config").mkdir()
    (tmp_path / "no_config" / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "neither").mkdir()
    (tmp_path / "prompts.jsonl").write_text('{"input": "1 + 1 =", "label": "2"}\n')
    (tmp_path / "prompts.csv").write_text("input,label\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "my_rewards.py").write_text("LIMIT = 3\n\n\nasync def length(args, sample):\n    return 0.0\n")
    (tmp_path / "broken_rewards.py").write_text("import math\nmath.no_such_function()\n")
    return tmp_path


@pytest.fixture
def command() -> Callable[..., list[str]]:
    """``command("grpo", "--lr 0", drop=["--save"])``: a valid command line with something added or dropped."""

    def build(base: str, add: str = "", drop: tuple[str, ...] = ()) -> list[str]:
        flags = {name: value for name, value in BASES[base].items() if name not in drop}
        argv = [word for name, value in flags.items() for word in ([name] if value is None else [name, value])]
        return argv + add.split()

    return build
