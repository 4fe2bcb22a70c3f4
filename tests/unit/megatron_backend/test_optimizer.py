"""What the optimizer's flags come to on this machine."""

from __future__ import annotations

import logging

import pytest
import torch

from opd.config.schema import ParallelFlags

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]


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
