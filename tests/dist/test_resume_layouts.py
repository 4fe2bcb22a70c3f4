"""A checkpoint of one layout goes on in another as if it had never stopped: the next two steps, optimizer included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.launch import free_port, launch
from tests.dist.resume_steps import CASES
from tests.tiny_models import write_tiny_model

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]

RESUMED = [(objective, saving, going_on) for objective, saving, others in CASES for going_on in others]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def steps(folder: Path) -> dict[str, Any]:
    write_tiny_model(folder / "student", "qwen3", tied=True)
    write_tiny_model(folder / "deep", "qwen3", tied=True, num_layers=4)
    write_tiny_model(folder / "experts", "qwen3_moe", tied=False)
    write_tiny_model(folder / "teacher", "llama", tied=False, num_layers=4, seed=1)
    arguments = {"folder": str(folder), "ports": [free_port() for _ in range(len(CASES) + len(RESUMED))]}
    first, second = launch("tests.dist.resume_steps:run", ranks=2, arguments=arguments, timeout_s=360)
    return second | first


@pytest.mark.parametrize(("objective", "saving", "going_on"), RESUMED)
def test_the_next_two_losses_are_those_of_the_run_that_went_on(steps, objective, saving, going_on):
    expected = steps[f"{objective}: {saving} -> None"]
    got = steps[f"{objective}: {saving} -> {going_on}"]
    assert [row.keys() for row in got] == [row.keys() for row in expected]
    for got_row, expected_row in zip(got, expected, strict=True):
        for name, value in expected_row.items():
            assert got_row[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    # Another second step than the first: what is compared does move.
    assert expected[0]["grad_norm"] != pytest.approx(expected[1]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_what_several_ranks_export_is_what_their_checkpoint_holds(single_process, steps, folder, layout):
    from opd.megatron_backend.checkpoint_layout import resolve
    from opd.megatron_backend.convert import torch_dist_to_hf

    converted = folder / f"converted_{layout}"
    torch_dist_to_hf(resolve(folder / "penalty" / layout), folder / "student", converted, say=len)
    assert_same_weights(folder / f"export_{layout}_1", converted)


def test_two_processes_share_out_a_conversion(steps, folder):
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert steps["converted"] == ["__0_0.distcp", "__1_0.distcp", *parts]
    assert_same_weights(folder / "student", folder / "back")


def assert_same_weights(folder: Path, other: Path) -> None:
    from safetensors.torch import load_file

    first, second = (
        {name: tensor for file in each.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for each in (folder, other)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
