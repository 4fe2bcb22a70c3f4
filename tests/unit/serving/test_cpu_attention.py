"""Attention of new tokens over a cached prefix against softmax by hand; what it leaves to SGLang."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opd.serving.cpu_attention import extend_attention

pytestmark = pytest.mark.unit

HEADS, KEY_HEADS, SIZE = 4, 2, 8
SEQUENCES = [(0, 5), (7, 3), (4, 1)]  # (cached, new) tokens: nothing cached, several new ones, one new one


def _step() -> dict[str, Any]:
    """Arguments of one step of a server, its cache slots in no order."""
    generator = torch.Generator().manual_seed(3)
    lengths = [cached + new for cached, new in SEQUENCES]
    slots = torch.randperm(sum(lengths) + 9, generator=generator)
    rows = torch.zeros(5, max(lengths), dtype=torch.long)
    requests = torch.tensor([3, 0, 4])
    for request, length, part in zip(requests, lengths, slots[: sum(lengths)].split(lengths), strict=True):
        rows[request, :length] = part
    return {
        "query": torch.randn(sum(new for _, new in SEQUENCES), HEADS, SIZE, generator=generator),
        "keys": torch.randn(len(slots), KEY_HEADS, SIZE, generator=generator),
        "values": torch.randn(len(slots), KEY_HEADS, SIZE, generator=generator),
        "rows": rows,
        "requests": requests,
        "lengths": torch.tensor(lengths),
        "cached": torch.tensor([cached for cached, _ in SEQUENCES]),
        "new": torch.tensor([new for _, new in SEQUENCES]),
    }


def _by_hand(step: dict[str, Any], scale: float) -> torch.Tensor:
    out, first = [], 0
    for request, (cached, new) in zip(step["requests"], SEQUENCES, strict=True):
        slots = step["rows"][request, : cached + new]
        keys = step["keys"][slots].repeat_interleave(HEADS // KEY_HEADS, dim=1).double()
        values = step["values"][slots].repeat_interleave(HEADS // KEY_HEADS, dim=1).double()
        for i in range(new):
            seen = cached + i + 1
            weights = torch.einsum("hd,shd->hs", step["query"][first + i].double() * scale, keys[:seen]).softmax(-1)
            out.append(torch.einsum("hs,shd->hd", weights, values[:seen]))
        first += new
    return torch.stack(out)


def _call(step: dict[str, Any], original: Any, **how: Any) -> torch.Tensor:
    return extend_attention(
        original, None, step["query"], torch.full_like(step["query"], 99.0), step["keys"], step["values"], step["rows"],
        step["requests"], step["lengths"], step["cached"], step["new"], None, **how,
    )  # fmt: skip


def test_new_rows_match_softmax_by_hand() -> None:
    step = _step()
    out = _call(step, None, scaling=0.3, enable_gqa=True, causal=True)
    assert (out - _by_hand(step, 0.3)).abs().max() < 1e-5


@pytest.mark.parametrize("how", [{"causal": False}, {"causal": True, "sliding_window_size": 4}])
def test_other_attention_is_sglangs_own(how: dict[str, Any]) -> None:
    given: dict[str, Any] = {}

    def original(backend: Any, *tensors: Any, **options: Any) -> torch.Tensor:
        given.update(options)
        return tensors[1]

    assert float(_call(_step(), original, scaling=0.3, is_cross_attn=True, **how).min()) == 99.0
    assert given | how == given
    assert (given["scaling"], given["is_cross_attn"]) == (0.3, True)
