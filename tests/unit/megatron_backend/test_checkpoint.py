"""Save and load in one process: exact resumption, refusals, and what a failed save leaves behind."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_models import VOCAB_SIZE, write_tiny_model
from tests.unit.megatron_backend.limits import files_limited_to

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, "qwen3", tied=True)
    return folder


def build(folder: Path, dtype: torch.dtype = torch.float32):
    from opd.megatron_backend import hf_bridge
    from opd.megatron_backend.groups import ParallelSizes

    model = hf_bridge.build_model(hf_bridge.read_hf_config(folder), ParallelSizes(), dtype=dtype)
    hf_bridge.load_hf_weights(model, folder)
    return model


class Training:
    """Model, optimizer and scheduler as a trainer holds them."""

    def __init__(self, folder: Path, *, bf16: bool, distributed: bool) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        from megatron.core.transformer.module import Float16Module

        dtype = torch.bfloat16 if bf16 else torch.float32
        model = build(folder, dtype)
        config = model.config
        wrapped = Float16Module(config, model) if bf16 else model
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
        self.ddp = DistributedDataParallel(config, ddp, wrapped)
        options = OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=0.0, bf16=bf16, params_dtype=dtype, use_distributed_optimizer=distributed
        )
        self.optimizer = get_megatron_optimizer(options, [self.ddp])
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=1e-3, min_lr=0.0, lr_warmup_steps=2, lr_decay_steps=10,
            lr_decay_style="linear", start_wd=0.0, end_wd=0.0, wd_incr_steps=0, wd_incr_style="constant",
        )  # fmt: skip

    def steps(self, number: int) -> list[float]:
        from megatron.core.distributed import finalize_model_grads

        tokens = torch.randint(0, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(2))
        losses = []
        for _ in range(number):
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            loss = self.ddp(tokens[:, :-1], torch.arange(16).expand(2, 16), None, labels=tokens[:, 1:]).mean()
            loss.backward()
            finalize_model_grads([self.ddp])
            self.optimizer.step()
            self.scheduler.step(increment=1)
            losses.append(loss.item())
        return losses

    def parts(self) -> dict:
        return {"model": self.ddp, "optimizer": self.optimizer, "scheduler": self.scheduler, "with_rng": True}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_resumed_run_is_the_run_that_went_on(
    tmp_path: Path, model_folder: Path, bf16: bool, distributed: bool
) -> None:
    from opd.megatron_backend import checkpoint

    first = Training(model_folder, bf16=bf16, distributed=distributed)
    first.steps(3)
    checkpoint.save(tmp_path, 3, **first.parts(), extra={"cursor": [1, "x"]})
    expected = first.steps(3)
    second = Training(model_folder, bf16=bf16, distributed=distributed)
    loaded = checkpoint.load(tmp_path, **second.parts())
    assert (loaded.iteration, loaded.extra) == (3, {"cursor": [1, "x"]})
    assert loaded.path == tmp_path / "iter_0000003"
    assert second.steps(3) == expected
    pairs = zip(first.ddp.parameters(), second.ddp.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_another_kind_of_optimizer_goes_on(tmp_path: Path, model_folder: Path, bf16: bool, distributed: bool) -> None:
    from opd.megatron_backend import checkpoint

    first = Training(model_folder, bf16=bf16, distributed=distributed)
    first.steps(3)
    checkpoint.save(tmp_path, 3, **first.parts())
    expected = first.steps(3)
    second = Training(model_folder, bf16=bf16, distributed=not distributed)
    checkpoint.load(tmp_path, **second.parts())
    assert second.steps(3) == expected


@pytest.mark.parametrize("distributed", [False, True])
def test_the_flags_of_the_resumed_run_win(tmp_path: Path, model_folder: Path, distributed: bool) -> None:
    from opd.megatron_backend import checkpoint

    first = Training(model_folder, bf16=False, distributed=distributed)
    first.steps(1)
    checkpoint.save(tmp_path, 1, **first.parts())
    second = Training(model_folder, bf16=False, distributed=distributed)
    for group in second.optimizer.param_groups:
        group["betas"] = (0.5, 0.6)
    checkpoint.load(tmp_path, model=second.ddp, optimizer=second.optimizer)
    assert {group["betas"] for group in second.optimizer.param_groups} == {(0.5, 0.6)}
    state = second.optimizer.chained_optimizers[0].optimizer.state.values()
    assert {int(each["step"]) for each in state} == {1}


@pytest.mark.parametrize("distributed", [False, True])
def test_saved_before_the_first_optimizer_step(tmp_path: Path, model_folder: Path, distributed: bool) -> None:
    """As a student is while its critic alone learns."""
    from opd.megatron_backend import checkpoint

    first = Training(model_folder, bf16=True, distributed=distributed)
    checkpoint.save(tmp_path, 1, **first.parts())
    expected = first.steps(2)
    second = Training(model_folder, bf16=True, distributed=distributed)
    with torch.no_grad():
        for parameter in second.ddp.parameters():
            parameter.zero_()
    checkpoint.load(tmp_path, **second.parts())
    assert second.steps(2) == expected


@pytest.mark.parametrize("distributed", [False, True])
def test_a_copy_is_not_torn_by_the_training_that_goes_on(tmp_path: Path, model_folder: Path, distributed: bool) -> None:
    from opd.megatron_backend import checkpoint

    first = Training(model_folder, bf16=True, distributed=distributed)
    first.steps(2)
    snapshot = checkpoint.take(tmp_path, 2, **first.parts(), copy=True)
    expected = first.steps(3)
    snapshot.write()
    second = Training(model_folder, bf16=True, distributed=distributed)
    checkpoint.load(tmp_path, **second.parts())
    assert second.steps(3) == expected


def test_optimizer_state_of_one_layout_only_is_refused(tmp_path: Path, model_folder: Path) -> None:
    from opd.megatron_backend import checkpoint

    training = Training(model_folder, bf16=False, distributed=True)
    training.steps(1)
    path = checkpoint.save(tmp_path, 1, **training.parts())
    common = torch.load(path / "common.pt")
    common["optimizer"]["param_state_sharding_type"] = "dp_reshardable"
    torch.save(common, path / "common.pt")
    with pytest.raises(checkpoint.CheckpointError, match="cut as `dp_reshardable`.*--no-load-optim"):
        checkpoint.load(tmp_path, **training.parts())


def test_generators_continue_where_they_were(tmp_path: Path, model_folder: Path) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from opd.megatron_backend import checkpoint

    def draw() -> list[float]:
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(()).item()
        return [random.random(), float(np.random.rand()), torch.rand(()).item(), tracked]

    model = build(model_folder)
    draw()
    checkpoint.save(tmp_path, 1, model=model, with_rng=True)
    expected = draw()
    draw()
    checkpoint.load(tmp_path, model=model, with_rng=True)
    assert draw() == expected


def test_weights_alone_load_without_an_optimizer_and_keep_their_dtype(tmp_path: Path, model_folder: Path) -> None:
    from opd.megatron_backend import checkpoint

    training = Training(model_folder, bf16=True, distributed=True)
    training.steps(1)
    checkpoint.save(tmp_path, "release", **training.parts())
    assert checkpoint.weights_dtype(checkpoint.resolve(tmp_path)) is torch.bfloat16
    model = build(model_folder, torch.bfloat16)
    loaded = checkpoint.load(tmp_path, model=model)
    assert loaded.iteration == "release"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), training.ddp.parameters(), strict=True))


@pytest.mark.parametrize("num_bytes", [10, 20_000])  # refuses common.pt; only the tensors
def test_a_full_disk_leaves_the_previous_checkpoint_valid(tmp_path: Path, model_folder: Path, num_bytes: int) -> None:
    from opd.megatron_backend import checkpoint

    model = build(model_folder)
    checkpoint.save(tmp_path, 1, model=model, extra={"n": 1})
    with files_limited_to(num_bytes), pytest.raises(checkpoint.CheckpointError) as failure:
        checkpoint.save(tmp_path, 2, model=model, extra={"n": 2})
    message = str(failure.value)
    assert f"could not save step 2 to `{tmp_path}`" in message and "step 1 stays the latest" in message
    assert "File too large" in message or "as when the disk is full" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert checkpoint.load(tmp_path, model=model).extra == {"n": 1}
    checkpoint.save(tmp_path, 2, model=model, extra={"n": 2})
    assert checkpoint.load(tmp_path, model=model).extra == {"n": 2}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path, model_folder: Path) -> None:
    from opd.megatron_backend import checkpoint

    tmp_path.chmod(0o500)
    with pytest.raises(checkpoint.CheckpointError, match="there is no earlier checkpoint"):
        checkpoint.save(tmp_path / "new", 1, model=build(model_folder))


def test_another_model_or_a_missing_part_is_refused(tmp_path: Path, model_folder: Path) -> None:
    from opd.megatron_backend import checkpoint

    model = build(model_folder)
    checkpoint.save(tmp_path, 1, model=model)
    write_tiny_model(tmp_path / "untied", "qwen3", tied=False)
    write_tiny_model(tmp_path / "deeper", "qwen3", tied=True, num_layers=3)
    for other in ("untied", "deeper"):
        with pytest.raises(checkpoint.CheckpointError, match="does not fit this model"):
            checkpoint.load(tmp_path, model=build(tmp_path / other))
    training = Training(model_folder, bf16=False, distributed=True)
    with pytest.raises(checkpoint.CheckpointError, match="holds no optimizer state.*--no-load-optim"):
        checkpoint.load(tmp_path, model=training.ddp, optimizer=training.optimizer)
    with pytest.raises(checkpoint.CheckpointError, match="holds no scheduler state"):
        checkpoint.load(tmp_path, model=training.ddp, scheduler=training.scheduler)


class Called:
    def __init__(self, function=os.system, *arguments):
        self.call = function, arguments or ("true",)

    def __reduce__(self):
        return self.call


def test_an_index_of_an_early_python_3_11_is_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    from opd.megatron_backend.checkpoint_index import check_index

    member = Called(getattr, _MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")  # as these pickle it
    (tmp_path / ".metadata").write_bytes(pickle.dumps(member))
    check_index(tmp_path)
    assert pickle.loads(pickle.dumps(member)) is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


def test_an_index_that_would_run_code_is_not_unpickled(tmp_path: Path, model_folder: Path) -> None:
    from opd.megatron_backend import checkpoint

    model = build(model_folder)
    path = checkpoint.save(tmp_path, 1, model=model)
    (path / ".metadata").write_bytes(pickle.dumps(Called()))
    with pytest.raises(checkpoint.CheckpointError, match=r"not to be trusted: `posix.system` has no place"):
        checkpoint.load(tmp_path, model=model)
    (path / ".metadata").write_bytes(pickle.dumps(Called(getattr, Path, "home")))
    with pytest.raises(checkpoint.CheckpointError, match="`home` of `<class 'pathlib.Path'>` has no place"):
        checkpoint.load(tmp_path, model=model)
    (path / ".metadata").write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.load(tmp_path, model=model)
    (path / ".metadata").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="has no .metadata"):
        checkpoint.load(tmp_path, model=model)
