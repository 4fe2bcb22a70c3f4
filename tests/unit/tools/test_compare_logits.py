"""The comparison by hand-worked numbers, and the tool on a model and on its neighbour."""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import warm
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "compare_logits.py"
TINY = ROOT / "examples" / "on_policy_distillation" / "tiny_task" / "student"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_logits", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_logits"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_differences_of_known_logits(tool):
    """Two positions, two tokens; token 1 follows. One logit differs by ln 3: log-prob ln(1/2) against ln(3/4)."""
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    found = torch.tensor([[0.0, math.log(3)], [1.0, 0.0]])
    got = tool._differences(expected, found, torch.tensor([0, 1]))
    assert got.num_tokens == 2
    assert got.max_difference == pytest.approx(math.log(3))
    assert got.max_logprob_difference == pytest.approx(math.log(0.75) - math.log(0.5))
    assert got.same_argmax == 1


def test_a_conversion_passes_and_another_model_does_not(tmp_path: Path, single_process: None) -> None:
    from opd.megatron_backend import convert

    source = tmp_path / "hf"
    write_tiny_model(source, "qwen3", tied=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, source / name)
    convert.hf_to_torch_dist(source, tmp_path / "torch_dist", say=lambda text: None)
    assert run(source, tmp_path / "torch_dist") == (0, "Within 0.0001.")
    write_tiny_model(source, "qwen3", tied=True, seed=1)
    assert run(source, tmp_path / "torch_dist", cold=False) == (1, "NOT within 0.0001.")


def run(hf_checkpoint: Path, torch_dist: Path, *, cold: bool = True) -> tuple[int, str]:
    """(exit status, verdict)"""
    paths = ["--hf-checkpoint", str(hf_checkpoint), "--torch-dist", str(torch_dist)]
    command = [str(TOOL), *paths, "--tolerance", "1e-4"]
    if cold:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200)
    else:
        done = warm.run(command, timeout=200)
    return done.returncode, done.stdout.strip().partition("positions. ")[2]
