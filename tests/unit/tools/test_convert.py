"""HF -> torch_dist -> HF is exact for every family; the two commands, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_models import FAMILIES, LLAMA3_ROPE, write_tiny_model

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_model(folder: Path, other: Path) -> None:
    first, second = tensors(folder), tensors(other)
    assert first.keys() == second.keys()
    assert all(first[n].dtype is second[n].dtype and torch.equal(first[n], second[n]) for n in first)
    assert json.loads((folder / "config.json").read_text()) == json.loads((other / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_exact(
    tmp_path: Path, single_process: None, family: str, tied: bool, dtype: torch.dtype
) -> None:
    from opd.megatron_backend import convert
    from opd.megatron_backend.checkpoint_layout import hf_files, resolve
    from opd.megatron_backend.groups import ParallelSizes

    source, middle, back = tmp_path / "hf", tmp_path / "torch_dist", tmp_path / "back"
    rope = LLAMA3_ROPE if family == "llama" else None
    write_tiny_model(source, family, tied=tied, dtype=dtype, rope=rope)
    said: list[str] = []
    done = convert.hf_to_torch_dist(source, middle, ParallelSizes(), say=said.append)
    assert (done.path, done.dtype) == (middle / "release", dtype)
    origin = hf_files(middle)
    assert origin is not None
    convert.torch_dist_to_hf(resolve(middle), origin, back, ParallelSizes(), max_shard_size="60KB", say=said.append)
    assert len(list(back.glob("*.safetensors"))) > 1  # the limit was respected
    assert_same_model(source, back)
    assert said == [f"loading {source}", f"writing {middle}", f"loading {middle / 'release'}", f"writing {back}"]


def test_config_states_the_dtype_of_the_weights(tmp_path: Path, single_process: None) -> None:
    from opd.megatron_backend import checkpoint, convert, hf_bridge
    from opd.megatron_backend.groups import ParallelSizes

    source = tmp_path / "hf"
    write_tiny_model(source, "qwen2", tied=True, dtype=torch.bfloat16)
    model = hf_bridge.build_model(hf_bridge.read_hf_config(source), ParallelSizes(), dtype=torch.float32)
    hf_bridge.load_hf_weights(model, source)
    path = checkpoint.save(tmp_path / "trained", 1, model=model)
    convert.torch_dist_to_hf(path, source, tmp_path / "back", ParallelSizes(), say=lambda text: None)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"
    assert tensors(tmp_path / "back")["model.norm.weight"].dtype is torch.float32


def run(tool: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")


def test_the_two_commands(tmp_path: Path) -> None:
    source, middle, back = tmp_path / "hf", tmp_path / "torch_dist", tmp_path / "back"
    write_tiny_model(source, "qwen3", tied=True)
    model_args = "--num-layers 2 --swiglu --qk-layernorm --norm-epsilon 1e-6 --some-slime-flag 3".split()
    there = run("convert_hf_to_torch_dist.py", "--hf-checkpoint", source, "--save", middle, *model_args)
    assert there.returncode == 0, there.stderr
    assert (middle / "latest_checkpointed_iteration.txt").read_text() == "release"
    again = run("convert_torch_dist_to_hf.py", "--input-dir", middle / "release", "--output-dir", back)
    assert again.returncode == 0, again.stderr
    assert_same_model(source, back)


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_what_the_commands_refuse(tmp_path: Path) -> None:
    source, full = tmp_path / "hf", tmp_path / "full"
    write_tiny_model(source, "qwen3", tied=True)
    full.mkdir()
    (full / "keep.txt").write_text("precious")
    to_dist, to_hf = "convert_hf_to_torch_dist.py", "convert_torch_dist_to_hf.py"
    assert_refused(run(to_dist, "--hf-checkpoint", source, "--save", full), f"`--save={full}` is not empty")
    assert_refused(
        run(to_dist, "--hf-checkpoint", source, "--save", tmp_path / "new", "--num-layers", "3"),
        "`--num-layers=3` contradicts `--hf-checkpoint`, whose config.json says 2",
    )
    assert_refused(run(to_dist, "--hf-checkpoint", full, "--save", tmp_path / "new"), "holds neither config.json")
    assert_refused(
        run(to_hf, "--input-dir", source, "--output-dir", tmp_path / "new"), f"`{source}` holds no checkpoint"
    )
    assert_refused(run(to_hf, "--input-dir", tmp_path / "no", "--output-dir", tmp_path / "new"), "does not exist")
    assert (full / "keep.txt").read_text() == "precious" and not (tmp_path / "new").exists()
