"""How weights are chosen to travel, what is kept of them for a restart, and the form in which they are broadcast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opd.config.schema import CheckpointFlags, Config, RolloutFlags
from opd.errors import EngineError
from opd.rollout.sglang_start import weight_sync_method
from opd.rollout.weight_sync import FolderSync
from opd.serving.update_group import flat_bucket
from opd.serving.weight_copy import WeightCopy

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def test_a_copy_is_the_last_whole_push_in_the_same_memory() -> None:
    copy = WeightCopy()
    with pytest.raises(ValueError, match="no whole set"):
        copy.read()
    trained = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert [name for name, _ in copy.recorded(trained.items())] == ["a", "b"]
    before = {name: kept.data_ptr() for name, kept in copy.read()}
    trained["a"].fill_(5.0)  # the trainer's next step
    assert dict(copy.read())["a"].tolist() == [1.0, 1.0, 1.0]
    list(copy.recorded([("a", trained["a"])]))
    assert {name: (kept.tolist(), kept.data_ptr()) for name, kept in copy.read()} == {"a": ([5.0] * 3, before["a"])}


def test_a_push_that_breaks_off_leaves_no_copy() -> None:
    def breaks_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(1)
        raise ArithmeticError

    copy = WeightCopy()
    list(copy.recorded([("a", torch.ones(1))]))
    with pytest.raises(ArithmeticError):
        list(copy.recorded(breaks_off()))
    with pytest.raises(ValueError, match="no whole set"):
        copy.read()


def test_a_broadcast_bucket_is_all_bytes_in_a_row_and_aligned() -> None:
    bucket = [("odd", torch.tensor([True])), ("b", torch.randn(3, 2).bfloat16().t()), ("f", torch.tensor(2.5))]
    described, flat = flat_bucket(bucket)
    assert described["names"] == ["f", "b", "odd"]
    assert described["dtypes"] == ["float32", "bfloat16", "bool"]
    assert described["shapes"] == [[], [2, 3], [1]]
    offset = 0
    for name, dtype, shape in zip(described["names"], described["dtypes"], described["shapes"], strict=True):
        kind = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        assert offset % kind.itemsize == 0
        assert torch.equal(flat[offset : offset + size].view(kind).view(shape), dict(bucket)[name])
        offset += size
    assert offset == flat.numel()


class NoReceivers:
    def each(self, start) -> None: ...


def test_the_last_folder_is_kept_until_the_next_is_whole(tmp_path: Path) -> None:
    model, target = tmp_path / "model", tmp_path / "sync"
    model.mkdir()
    (target / "weights-99").mkdir(parents=True)  # of a run that was killed
    sync = FolderSync(target, model_folder=model)
    for version in (1, 2):
        sync.push(NoReceivers(), [("a", torch.ones(1))], version)
        assert [path.name for path in target.iterdir()] == [f"weights-{version}"]
    sync.close()
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "free", "method"),
    [("auto", 100, "memory"), ("auto", 99, "disk"), ("disk", 100, "disk"), ("memory", 0, "memory")],
)
def test_auto_takes_shared_memory_where_the_weights_fit(tmp_path: Path, flag: str, free: int, method: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    config = Config(
        checkpoint=CheckpointFlags(hf_checkpoint=str(tmp_path)), rollout=RolloutFlags(sglang_weight_sync=flag)
    )
    assert weight_sync_method(config, CPU, free_shared_memory=lambda: free) == method


def test_a_broadcast_to_servers_on_the_trainers_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = Config(rollout=RolloutFlags(sglang_weight_sync="distributed"))
    with pytest.raises(EngineError, match="NCCL refuses two processes on one, and this machine has 1 for 1 training"):
        weight_sync_method(config, SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert weight_sync_method(config, SimpleNamespace(type="cuda")) == "distributed"
