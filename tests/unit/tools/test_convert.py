"""HF -> torch_dist -> HF is exact for every family; the two commands, and what they refuse."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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

    source, middle, back = tmp_path / "hf", tmp_path / "torch_dist", tmp_path / "back"
    rope = LLAMA3_ROPE if family == "llama" else None
    write_tiny_model(source, family, tied=tied, dtype=dtype, rope=rope)
    said: list[str] = []
    done = convert.hf_to_torch_dist(source, middle, say=said.append)
    assert (done.path, done.dtype) == (middle / "release", dtype)
    origin = hf_files(middle)
    assert origin is not None
    convert.torch_dist_to_hf(resolve(middle), origin, back, max_file_bytes=60_000, say=said.append)
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
    convert.torch_dist_to_hf(path, source, tmp_path / "back", say=lambda text: None)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"
    assert tensors(tmp_path / "back")["model.norm.weight"].dtype is torch.float32


def test_the_index_is_that_of_a_model_that_was_built_and_saved(tmp_path: Path, single_process: None) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    from opd.megatron_backend import checkpoint, convert, hf_bridge
    from opd.megatron_backend.groups import ParallelSizes

    write_tiny_model(tmp_path / "hf", "llama", tied=False)
    model = hf_bridge.build_model(hf_bridge.read_hf_config(tmp_path / "hf"), ParallelSizes(), dtype=torch.float32)
    hf_bridge.load_hf_weights(model, tmp_path / "hf")
    built = checkpoint.save(tmp_path / "built", "release", model=model)
    streamed = convert.hf_to_torch_dist(tmp_path / "hf", tmp_path / "torch_dist", max_file_bytes=50_000, say=len).path
    first, second = (FileSystemReader(path).read_metadata() for path in (built, streamed))
    assert first.state_dict_metadata == second.state_dict_metadata
    assert len(list(built.glob("*.distcp"))) == 1 < len(list(streamed.glob("*.distcp")))


def test_weights_of_another_model_are_refused(tmp_path: Path, single_process: None) -> None:
    from opd.megatron_backend import convert
    from opd.megatron_backend.checkpoint_layout import CheckpointError
    from opd.megatron_backend.hf_bridge import UnsupportedModelError

    for name, changes in {"two": {}, "three": {"num_layers": 3}, "untied": {"tied": False}}.items():
        write_tiny_model(tmp_path / name, "qwen3", **{"tied": True, **changes})
    path = convert.hf_to_torch_dist(tmp_path / "two", tmp_path / "torch_dist", say=len).path
    for other, message in {"three": "shape", "untied": "no `output_layer.weight`"}.items():
        with pytest.raises(CheckpointError, match=f"does not fit the model that .*{other}` describes.*{message}"):
            convert.torch_dist_to_hf(path, tmp_path / other, tmp_path / "back", say=len)
    untied = convert.hf_to_torch_dist(tmp_path / "untied", tmp_path / "other", say=len).path
    with pytest.raises(CheckpointError, match="`output_layer.weight`, which is not in that model"):
        convert.torch_dist_to_hf(untied, tmp_path / "two", tmp_path / "back", say=len)
    (tmp_path / "three" / "config.json").write_text((tmp_path / "untied" / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match="not those of its config.json: lm_head.weight is not there"):
        convert.hf_to_torch_dist(tmp_path / "three", tmp_path / "new", say=len)
    assert not (tmp_path / "back").exists() and not (tmp_path / "new").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by /proc")
def test_memory_is_that_of_a_few_tensors(tmp_path: Path, single_process: None) -> None:
    """A model of 68 MB, the largest tensor of which has 4 MB."""
    from opd.megatron_backend import convert

    source, middle, back = tmp_path / "hf", tmp_path / "torch_dist", tmp_path / "back"
    write_tiny_model(source, "qwen3", tied=True, vocab_size=2000, hidden_size=512, num_layers=12)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    with peak_memory() as there:
        path = convert.hf_to_torch_dist(source, middle, say=len).path
    with peak_memory() as again:
        convert.torch_dist_to_hf(path, source, back, max_file_bytes=30_000_000, say=len)
    assert size > 65e6
    assert max(there) < 0.4 * size and max(again) < 0.4 * size, (size, there, again)
    assert_same_model(source, back)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Fills a list with the bytes by which this process's memory grew at most during the block."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free already must not hide growth
    Path("/proc/self/clear_refs").write_text("5")  # from here on
    before, grown = _memory("VmRSS"), []
    yield grown
    grown.append(_memory("VmHWM") - before)


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


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
