"""Packing of weights into shared blocks and into a Hugging Face folder."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.errors import WeightSyncError
from opd.serving import weight_push

pytestmark = pytest.mark.unit


def _tensors() -> list[tuple[str, torch.Tensor]]:
    return [
        ("a", torch.arange(6.0).reshape(2, 3)),
        ("b", torch.randn(5, 7).bfloat16().t()),  # not contiguous
        ("c", torch.tensor([True, False])),
        ("d", torch.tensor(3.5, dtype=torch.float64)),
    ]


def test_buckets_keep_order_and_limit() -> None:
    sizes = [100, 50, 60, 300, 10]
    tensors = [(str(i), torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate(sizes)]
    names = [[name for name, _ in bucket] for bucket in weight_push.buckets(tensors, 192)]
    assert names == [["0", "1"], ["2"], ["3"], ["4"]]  # each tensor is padded to a multiple of 64 bytes
    assert list(weight_push.buckets([], 192)) == []


def test_a_shared_bucket_arrives_whole() -> None:
    strategy = torch.multiprocessing.get_sharing_strategy()
    payload, block = weight_push.share_bucket(_tensors())
    received = dict(pickle.loads(base64.b64decode(payload)))
    for name, tensor in _tensors()[:1] + _tensors()[2:]:
        assert torch.equal(received[name], tensor)
        assert received[name].dtype == tensor.dtype
    assert received["b"].shape == (7, 5)
    block.zero_()
    assert received["a"].abs().sum() == 0  # the same memory, not a copy
    assert torch.multiprocessing.get_sharing_strategy() == strategy


def test_too_little_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_push, "free_shared_memory", lambda: 64)
    with pytest.raises(WeightSyncError, match=r"do not fit.*/dev/shm.*--shm-size"):
        weight_push.share_bucket(_tensors())


def test_a_folder_has_weights_and_the_models_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_push, "BUCKET_BYTES", 100)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"old")
    (model / "model.safetensors.index.json").write_text("old")
    target = tmp_path / "sync" / "weights-3"
    tensors = _tensors()
    weight_push.write_folder(tensors, target, model_folder=model)
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {"a", "b", "c", "d"}
    assert len(set(index.values())) > 1
    for name, tensor in tensors:
        assert torch.equal(load_file(target / index[name])[name], tensor)
    assert (target / "config.json").is_file()
    assert not (target / "model.safetensors").exists()
