"""Adapters in two processes, in every layout, against one process: start, gradients, steps, checkpoints, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.launch import free_port, launch
from tests.dist.lora_steps import LAYOUTS
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.dist
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    write_tiny_model(folder / "model", "qwen3", tied=True)
    return folder


@pytest.fixture(scope="module")
def alone(single_process: None, work: Path) -> dict[str, Any]:
    """One process, from adapters whose B is not 0 (A would get no gradient), which it saves for the others."""
    from opd.megatron_backend import checkpoint
    from opd.megatron_backend.groups import ParallelSizes
    from tests.dist.lora_steps import AdapterTraining, two_steps

    start = AdapterTraining(work / "model", ParallelSizes())
    generator = torch.Generator().manual_seed(4)
    for name, parameter in start.model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    checkpoint.save(work / "start", 0, model=start.ddp)
    training = AdapterTraining(work / "model", ParallelSizes())
    return two_steps(training, str(work / "start"), work / "alone", work / "alone_peft")


@pytest.fixture(scope="module")
def results(alone: dict[str, Any], work: Path) -> list[dict[str, dict[str, Any]]]:
    """Per rank, then per layout."""
    arguments = {
        "folder": str(work / "model"),
        "start": str(work / "start"),
        "work": str(work),
        "ports": [free_port() for _ in LAYOUTS],
    }
    return launch("tests.dist.lora_steps:run_layouts", ranks=2, arguments=arguments, timeout_s=200)


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@layouts
def test_every_layout_starts_with_the_same_adapters(
    alone: dict[str, Any], results: list[dict[str, dict[str, Any]]], layout: str
) -> None:
    assert_same(results[0][layout]["fresh"], alone["fresh"], 0.0)
    assert all((t == 0).all() == ("lora_B" in name) for name, t in alone["fresh"].items())


@layouts
def test_gradients_are_those_of_one_process(
    alone: dict[str, Any], results: list[dict[str, dict[str, Any]]], layout: str
) -> None:
    assert all(gradient.abs().max() > 1e-4 for gradient in alone["gradients"].values())
    for rank in results:
        assert rank[layout]["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    if "gradients" in results[0][layout]:
        assert_same(results[0][layout]["gradients"], alone["gradients"], 1e-5)


@layouts
def test_steps_and_merged_weights_are_those_of_one_process(
    alone: dict[str, Any], results: list[dict[str, dict[str, Any]]], layout: str
) -> None:
    moved = max((alone["first"][n] - alone["second"][n]).abs().max() for n in alone["first"])
    assert moved > 5e-4
    assert_same(results[0][layout]["first"], alone["first"], 1e-5)
    # Adam divides by the root of a second moment near 0: a step of lr = 1e-3 carries rounding of about 1e-5.
    assert_same(results[0][layout]["second"], alone["second"], 2e-5)
    for rank in results:
        assert_same(rank[layout]["merged"], alone["merged"], 2e-5)


@layouts
def test_rank_0_writes_whole_peft_files(results: list[dict[str, dict[str, Any]]], work: Path, layout: str) -> None:
    assert_same(load_file(work / f"{layout}_peft" / "adapter_model.safetensors"), results[0][layout]["second"], 0.0)


@layouts
def test_one_process_goes_on_from_the_checkpoint(
    single_process: None, results: list[dict[str, dict[str, Any]]], work: Path, layout: str
) -> None:
    from opd.megatron_backend import checkpoint
    from opd.megatron_backend.groups import ParallelSizes
    from tests.dist.lora_steps import AdapterTraining

    training = AdapterTraining(work / "model", ParallelSizes(), flags=LAYOUTS[layout].get("flags", ()))
    checkpoint.load(work / layout, model=training.ddp, optimizer=training.optimizer)
    assert_same(training.adapters(), results[0][layout]["first"], 0.0)
    training.step()
    assert_same(training.adapters(), results[0][layout]["second"], 2e-5)
