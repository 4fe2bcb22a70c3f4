"""Two processes over gloo in every layout against a plain transformers model; one process loads their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.launch import free_port, launch
from tests.dist.workers import LAYOUTS
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.dist
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, "qwen3", tied=True)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(model_folder: Path, checkpoints: Path) -> list[dict[str, dict[str, Any]]]:
    """Per rank, then per layout."""
    arguments = {
        "folder": str(model_folder),
        "checkpoints": str(checkpoints),
        "ports": [free_port() for _ in LAYOUTS],
    }
    return launch("tests.dist.workers:run_layouts", ranks=2, arguments=arguments, timeout_s=240)


@layouts
def test_logits_are_those_of_one_process(results: list[dict[str, dict[str, Any]]], layout: str) -> None:
    assert max(rank[layout]["logits"] for rank in results) < 1e-5


@layouts
def test_gradients_are_those_of_one_process(results: list[dict[str, dict[str, Any]]], layout: str) -> None:
    for rank in results:
        assert rank[layout]["norm_ratio"] == pytest.approx(1.0, abs=1e-5)
        differences = rank[layout]["gradients"]
        assert all(difference < 1e-5 for difference in differences.values()), differences
        assert differences or layout in ("cp2", "dp2")


@layouts
def test_every_rank_exports_the_same_whole_weights(results: list[dict[str, dict[str, Any]]], layout: str) -> None:
    first, second = (rank[layout]["weights_after_two_steps"] for rank in results)
    assert first.keys() == second.keys() == results[0]["tp2"]["weights_after_two_steps"].keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@layouts
def test_one_process_goes_on_from_the_checkpoint(
    single_process: None,
    results: list[dict[str, dict[str, Any]]],
    model_folder: Path,
    checkpoints: Path,
    layout: str,
) -> None:
    """The second step after a load of weights, moments and step count is the second step of the run that saved."""
    from opd.megatron_backend import checkpoint
    from opd.megatron_backend.groups import ParallelSizes
    from tests.dist.model_step import Training

    training = Training(model_folder, ParallelSizes())
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.fill_(1.0)
    loaded = checkpoint.load(checkpoints / layout, model=training.ddp, optimizer=training.optimizer)
    assert (loaded.iteration, loaded.extra) == (1, {"n": 1})
    training.step()
    for name, tensor in training.weights().items():
        want = results[0][layout]["weights_after_two_steps"][name]
        torch.testing.assert_close(tensor, want, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_rank_that_cannot_write_fails_the_save_everywhere(
    results: list[dict[str, dict[str, Any]]], checkpoints: Path
) -> None:
    for rank in results:
        outcome = rank["tp2"]["full_disk"]
        assert f"could not save step 2 to `{checkpoints / 'tp2'}`" in outcome["message"]
        assert "rank 1" in outcome["message"] and "step 1 stays the latest" in outcome["message"]
        assert outcome["latest"] == 1
    assert sorted(p.name for p in (checkpoints / "tp2").iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
    ]
