"""Rows from memory, by hand: one layer, 2 key/value heads of 24 dimensions in fp32 are 384 bytes per token."""

from __future__ import annotations

import pytest
import torch

from opd.errors import UserError
from opd.sampling import running_requests as module
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.unit

CACHE = 100 * (2 * 384)  # 100 tokens in two models
LOGITS = module.LOGIT_COPIES * (4 + 1) * 50 * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("m"), "qwen3", tied=True, vocab_size=50, num_layers=1)


@pytest.mark.parametrize(
    ("limit", "requests", "rows_of_memory", "want"),
    [(64, 1000, 7.9, 7), (5, 1000, 99, 5), (64, 3, 99, 3), (None, 1000, 999, 256)],
)
def test_the_smallest_bound_counts(model, monkeypatch, limit, requests, rows_of_memory, want):
    monkeypatch.setattr(module, "memory_left", lambda device, share: rows_of_memory * (CACHE + LOGITS))
    shape = dict(tokens=100, vocab_size=50, draft_tokens=4, utilization=0.9)
    assert module.running_requests([model, model], limit=limit, requests=requests, **shape) == want


def test_memory_for_less_than_one_answer_is_an_error(model):
    with pytest.raises(UserError, match="`gpu_memory_utilization=1e-12` leaves 0 MiB beside the weights on cpu"):
        module.running_requests(
            [model, model], limit=None, requests=1, tokens=100, vocab_size=50, draft_tokens=4, utilization=1e-12
        )


def test_on_a_cpu_the_share_is_of_what_is_available():
    half, whole = (module.memory_left(torch.device("cpu"), share) for share in (0.5, 1.0))
    assert half == pytest.approx(whole / 2, rel=0.1)
