"""A model written tensor by tensor is the model: for transformers, over an earlier one, and on a full disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny_models import write_tiny_model
from tests.unit.megatron_backend.limits import files_limited_to

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]


def export(source: Path, target: Path, *, max_file_bytes: int = 10**9) -> None:
    from safetensors.torch import load_file

    from opd.megatron_backend.hf_export import export_hf

    weights = load_file(source / "model.safetensors")
    export_hf(iter(weights.items()), target, origin=source, max_file_bytes=max_file_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_file_bytes", [60_000, 10**9], ids=["sharded", "one file"])
def test_transformers_loads_the_same_weights(tmp_path: Path, dtype: torch.dtype, max_file_bytes: int) -> None:
    from transformers import AutoModelForCausalLM

    source, target = tmp_path / "source", tmp_path / "exports" / "step_7"
    model = write_tiny_model(source, "qwen3", tied=True, dtype=dtype)
    export(source, target, max_file_bytes=max_file_bytes)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    if max_file_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert loaded.dtype is dtype
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert [path.name for path in target.parent.iterdir()] == ["step_7"]


def test_an_earlier_export_is_replaced_and_its_neighbours_stay(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name, seed in (("first", 0), ("second", 1)):
        write_tiny_model(tmp_path / name, "qwen3", tied=True, seed=seed)
    target = tmp_path / "latest"
    export(tmp_path / "first", target, max_file_bytes=60_000)
    (target / "notes.md").write_text("mine")
    export(tmp_path / "second", target)
    assert {p.name for p in target.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.md",
    }
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "second", target))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    from opd.megatron_backend.checkpoint_layout import CheckpointError

    write_tiny_model(tmp_path / "source", "qwen3", tied=True)
    target = tmp_path / "step_1"
    with files_limited_to(90_000), pytest.raises(CheckpointError) as failure:
        export(tmp_path / "source", target)
    assert f"could not export the student to `{target}`: rank 0: [Errno 27] File too large" in str(failure.value)
    assert "choose another --save-hf" in str(failure.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_header_without_room_begins_another_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from opd.megatron_backend.safetensors_stream import SafetensorsStream, name_files

    tensors = {f"layer.{i}.weight": torch.arange(i + 1, dtype=torch.float32) for i in range(40)}
    stream = SafetensorsStream(tmp_path, max_file_bytes=10**9, header_bytes=1024)
    for name, tensor in tensors.items():
        stream.write(name, tensor)
    stream.close()
    name_files(tmp_path, stream.files)
    files = list(tmp_path.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 1 and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
