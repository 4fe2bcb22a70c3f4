"""Attention of new tokens over a cached prefix, and of a token of each sequence, against softmax by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opd.serving import cpu_attention
from opd.serving.cpu_attention import decode_attention, extend_attention

pytestmark = pytest.mark.unit

HEADS, KEY_HEADS, SIZE = 4, 2, 8
SEQUENCES = [(0, 5), (7, 3), (4, 1)]  # (cached, new) tokens: nothing cached, several new ones, one new one


def _step(sequences: list[tuple[int, int]] = SEQUENCES) -> dict[str, Any]:
    """Arguments of one step of a server, its cache slots in no order."""
    generator = torch.Generator().manual_seed(3)
    lengths = [cached + new for cached, new in sequences]
    slots = torch.randperm(sum(lengths) + 9, generator=generator)
    rows = torch.zeros(len(sequences) + 2, max(lengths), dtype=torch.long)
    requests = torch.randperm(len(sequences) + 2, generator=generator)[: len(sequences)]
    for request, length, part in zip(requests, lengths, slots[: sum(lengths)].split(lengths), strict=True):
        rows[request, :length] = part
    return {
        "query": torch.randn(sum(new for _, new in sequences), HEADS, SIZE, generator=generator),
        "keys": torch.randn(len(slots), KEY_HEADS, SIZE, generator=generator),
        "values": torch.randn(len(slots), KEY_HEADS, SIZE, generator=generator),
        "rows": rows,
        "requests": requests,
        "lengths": torch.tensor(lengths),
        "cached": torch.tensor([cached for cached, _ in sequences]),
        "new": torch.tensor([new for _, new in sequences]),
    }


def _by_hand(step: dict[str, Any], scale: float) -> torch.Tensor:
    out, first = [], 0
    for request, cached, new in zip(step["requests"], step["cached"], step["new"], strict=True):
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


DECODING = [(length, 1) for length in (5, 0, 17, 9, 3, 8, 12)]


def _decode(step: dict[str, Any], original: Any, **how: Any) -> torch.Tensor:
    return decode_attention(
        original, None, step["query"], torch.full_like(step["query"], 99.0), step["keys"], step["values"], step["rows"],
        step["requests"], step["lengths"], None, enable_gqa=True, causal=False, is_cross_attn=False, **how,
    )  # fmt: skip


@pytest.mark.parametrize("together", [1 << 19, 2 * 16 * 10], ids=["one call", "several calls"])
def test_one_token_of_each_sequence_matches_softmax_by_hand(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """Cache slots that belong to nobody hold no numbers: they must not be looked at."""
    monkeypatch.setattr(cpu_attention, "TOGETHER_KEYS", together)
    step = _step(DECODING)
    places = list(zip(step["requests"], step["lengths"], strict=True))
    used = torch.cat([step["rows"][request, :length] for request, length in places])
    unused = torch.ones(len(step["keys"]), dtype=torch.bool).index_fill(0, used, False)
    step["keys"][unused] = step["values"][unused] = float("nan")
    for request, length in places:
        step["rows"][request, length:] = int(unused.nonzero()[0])
    out = _decode(step, None, scaling=0.3, sliding_window_size=None)
    assert (out - _by_hand(step, 0.3)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("sequences", "how", "largest"),
    [
        (DECODING, {"sliding_window_size": 4}, 1 << 16),
        (DECODING[:3], {"sliding_window_size": None}, 1 << 16),
        (DECODING, {"sliding_window_size": None}, 17 * 16),  # one sequence is longer
    ],
    ids=["window", "few", "long"],
)
def test_what_gains_nothing_together_is_left_to_sglang(
    monkeypatch: pytest.MonkeyPatch, sequences: list[tuple[int, int]], how: dict[str, Any], largest: int
) -> None:
    monkeypatch.setattr(cpu_attention, "LARGEST_KEYS", largest)
    given: dict[str, Any] = {}

    def original(backend: Any, *tensors: Any, **options: Any) -> torch.Tensor:
        given.update(options)
        return tensors[1]

    assert float(_decode(_step(sequences), original, scaling=0.3, **how).min()) == 99.0
    assert given == {"scaling": 0.3, "enable_gqa": True, "causal": False, "is_cross_attn": False, **how}
