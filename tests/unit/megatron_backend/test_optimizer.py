"""What the optimizer's flags come to on this machine."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from opd.config.schema import ParallelFlags
from tests.tiny_models import write_tiny_model

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]


@pytest.mark.parametrize("flags", ["", "--bf16", "--use-distributed-optimizer"])
def test_moments_that_are_there_from_the_start_change_no_step(tmp_path: Path, flags: str) -> None:
    from opd.config.flags import parse_flags
    from opd.megatron_backend.build import _build_student, parallel_sizes
    from opd.megatron_backend.optimizer import allocate_moments

    write_tiny_model(tmp_path, "qwen3", tied=True)
    words = ["--hf-checkpoint", str(tmp_path), "--num-rollout", "9", "--rollout-batch-size", "2", "--lr", "1e-3"]
    config = parse_flags([*words, *flags.split()])
    after = []
    for early in (False, True):
        student, _ = _build_student(config, parallel_sizes(config))
        if early:
            allocate_moments(student.optimizer)
        for step in range(2):
            student.zero_grad()
            for number, parameter in enumerate(student.model.parameters()):
                parameter.main_grad.fill_(0.01 * (number + step))
            student.optimizer.step()
        after.append([parameter.detach().clone() for parameter in student.model.parameters()])
    for plain, early in zip(*after, strict=True):
        torch.testing.assert_close(early, plain, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernel may be there")
def test_fusion_is_left_out_with_one_warning_where_its_kernel_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    from opd.megatron_backend.optimizer import fuses_gradient_accumulation

    assert not fuses_gradient_accumulation(ParallelFlags())
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        asked = ParallelFlags(gradient_accumulation_fusion=True)
        assert not fuses_gradient_accumulation(asked) and not fuses_gradient_accumulation(asked)
    (record,) = caplog.records
    assert record.getMessage().startswith("--gradient-accumulation-fusion is left out")
