"""The likeliest tokens through the output head are the top k of the whole log-softmax; padding is never among them."""

from __future__ import annotations

import pytest
import torch

from opd.maths.head import OutputHead
from opd.maths.likely import likely_tokens


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize(("count", "temperature"), [(3, 1.0), (11, 0.7)])
def test_equal_to_the_top_of_the_whole_softmax(chunk: int, count: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_RH = torch.randn(7, 5, generator=generator)
    weight_VH = torch.randn(13, 5, generator=generator)
    weight_VH[11:] = 0  # padded rows: a logit of 0 would be likely
    head = OutputHead(weight_VH=weight_VH, vocab_size=11)
    ids_RK, logprobs_RK = likely_tokens(hidden_RH, head, count=count, temperature=temperature, chunk=chunk)
    want = (hidden_RH @ weight_VH[:11].t() / temperature).log_softmax(-1).topk(count)
    assert torch.equal(ids_RK, want.indices)
    torch.testing.assert_close(logprobs_RK, want.values, rtol=0, atol=1e-6)


def test_no_rows_give_none() -> None:
    head = OutputHead(weight_VH=torch.ones(4, 2), vocab_size=4)
    ids_RK, logprobs_RK = likely_tokens(torch.ones(0, 2), head, count=2, temperature=1.0, chunk=8)
    assert ids_RK.shape == logprobs_RK.shape == (0, 2)
