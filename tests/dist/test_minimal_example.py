"""``examples/minimal_opd.py`` and the framework compute the same step."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.dist.launch import launch

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TASK = EXAMPLES / "on_policy_distillation" / "tiny_task"
PROMPTS = [[9, 4, 17], [12, 5, 6, 30, 8]]
RESPONSES = [[4, 8, 16, 2], [4, 11], [19, 7, 5], [3] * 9, [21, 6, 2], [30, 14, 14, 5, 2]]  # three to each prompt
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 1.0]


def framework_step() -> dict[str, float]:
    """One update by the framework's trainer: its loss, reverse KL and gradient norm."""
    from opd.config.flags import parse_flags
    from opd.data.batching import make_batch
    from opd.megatron_backend import device
    from opd.step_metrics import batch_metrics
    from opd.training_signal import add_training_signal, outcome_advantages
    from opd.types import Sample, SampleStatus

    rank_device = device.install()
    from opd.megatron_backend.build import build_trainer

    config = parse_flags([
        "--hf-checkpoint", str(TASK / "student"), "--use-opd", "--opd-type", "megatron",
        "--opd-teacher-load", str(TASK / "teacher"), "--num-rollout", "1", "--rollout-batch-size", "2",
        "--n-samples-per-prompt", "3",
    ])  # fmt: skip
    trainer, _ = build_trainer(config, rank_device)
    samples = [
        Sample(
            index=i,
            group_index=i // 3,
            prompt="",
            tokens=PROMPTS[i // 3] + response,
            response_length=len(response),
            rollout_log_probs=[0.0] * len(response),
            status=SampleStatus.COMPLETED,
        )
        for i, response in enumerate(RESPONSES)
    ]
    groups_N = torch.tensor([sample.group_index for sample in samples])
    advantages_N = outcome_advantages(torch.tensor(REWARDS), groups_N, config.algorithm)
    batch = trainer.load(make_batch(samples, advantages_N, samples_per_step=len(samples)))
    for model in ("student", "teacher"):
        batch = trainer.forward_logprobs(batch, model)
    batch = trainer.map(partial(add_training_signal, config=config), batch)
    metrics: dict[str, Any] = batch_metrics(batch, trainer, config=config) | trainer.update(batch)
    trainer.close()
    return {name: metrics[name] for name in ("policy_loss", "opd_reverse_kl", "grad_norm")}


def minimal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_opd", EXAMPLES / "minimal_opd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loss_penalty_and_gradient_equal_the_frameworks() -> None:
    (framework,) = launch("tests.dist.test_minimal_example:framework_step", ranks=1)
    example = minimal()
    student = example.AutoModelForCausalLM.from_pretrained(TASK / "student", dtype=torch.float32)
    teacher = example.AutoModelForCausalLM.from_pretrained(TASK / "teacher", dtype=torch.float32)
    prompts = [PROMPTS[i // 3] for i in range(6)]
    loss, reverse_kl = example.opd_loss(student, teacher, prompts, RESPONSES, torch.tensor(REWARDS), group_size=3)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    assert loss.item() == pytest.approx(framework["policy_loss"], abs=1e-5)
    assert reverse_kl == pytest.approx(framework["opd_reverse_kl"], abs=1e-5)
    assert norm.item() == pytest.approx(framework["grad_norm"], rel=1e-5)


def test_it_learns(capsys: pytest.CaptureFixture[str]) -> None:
    example = minimal()
    example.main(4)
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[1].rstrip("%")) for line in (lines[0], lines[-1]))
    kls = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert len(kls) == 4 and sum(kls[2:]) < sum(kls[:2])
    assert last > first
