"""Attention and norm against slow twins, values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]

HEADS, GROUPS, DIM = 4, 2, 8


def slow_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """One query at a time, in the tensors' dtype: [T, H, D] against [T, G, D] -> [T, H * D]."""
    rows, start = [], 0
    for length in lengths:
        for position in range(start, start + length):
            heads = []
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                keys, values = k[start : position + 1, group], v[start : position + 1, group]
                heads.append(torch.softmax(keys @ q[position, head] / DIM**0.5, dim=0) @ values)
            rows.append(torch.cat(heads))
        start += length
    return torch.stack(rows)


def random_qkv(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (HEADS, GROUPS, GROUPS)
    q, k, v = (torch.randn(tokens, n, DIM, generator=generator, dtype=torch.float64) for n in sizes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def attention(cp: int = 1, rank: int = 0):
    from opd.megatron_backend.layers import SdpaAttention

    config = SimpleNamespace(kv_channels=DIM)
    group = SimpleNamespace(size=lambda: cp, rank=lambda: rank)
    return SdpaAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=group))


def packed_params(lengths: list[int]):
    from megatron.core.packed_seq_params import PackedSeqParams

    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)


def assert_same_values_and_gradients(got: torch.Tensor, want: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=want.dtype)
    for mine, slow in zip(torch.autograd.grad((got * weights).sum(), inputs, retain_graph=True),
                          torch.autograd.grad((want * weights).sum(), inputs), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [3, 17, 1, 16, 12, 2], [1, 1, 40]])
def test_packed_attention_is_causal_attention_within_each_sequence(lengths: list[int]) -> None:
    q, k, v = random_qkv(sum(lengths))
    out = attention()(q, k, v, packed_seq_params=packed_params(lengths))
    assert_same_values_and_gradients(out, slow_attention(q, k, v, lengths), (q, k, v))


def test_dense_attention_ignores_the_mask_argument_and_is_causal() -> None:
    q, k, v = random_qkv(14)
    dense = [x.unflatten(0, (2, 7)).transpose(0, 1) for x in (q, k, v)]  # [S=7, B=2, heads, D]
    out = attention()(*dense, attention_mask=torch.ones(1, 1, 7, 7, dtype=torch.bool))
    want = slow_attention(q, k, v, [7, 7])
    assert_same_values_and_gradients(out.transpose(0, 1).reshape(14, -1), want, (q, k, v))


@pytest.mark.parametrize("cp", [2, 3])
def test_context_parallel_shards_put_together_are_the_whole(cp: int) -> None:
    """Every rank's part computed here in one process, from keys gathered by hand in rank order."""
    lengths = [2 * cp * n for n in (3, 1, 4, 2, 2)]
    q, k, v = random_qkv(sum(lengths))
    mine: list[list[int]] = [[] for _ in range(cp)]  # global token indices each rank holds
    start = 0
    for length in lengths:
        chunks = torch.arange(start, start + length).chunk(2 * cp)
        for rank in range(cp):
            mine[rank] += chunks[rank].tolist() + chunks[2 * cp - 1 - rank].tolist()
        start += length
    gathered = torch.tensor(sum(mine, []))
    parts = [
        attention(cp, rank)._packed(q[mine[rank]], k[gathered], v[gathered], packed_params(lengths))
        for rank in range(cp)
    ]
    out = torch.cat(parts)[gathered.argsort()]
    assert_same_values_and_gradients(out, slow_attention(q, k, v, lengths), (q, k, v))


def test_sequences_share_a_call_only_when_of_similar_length() -> None:
    from opd.megatron_backend.layers import pack_plan

    plan = pack_plan((10, 100, 9, 80, 7, 6, 30), 1, 0, torch.device("cpu"))
    assert [sorted(b.key_index.shape) for b in plan.buckets] == [[2, 100], [1, 30], [3, 10], [1, 6]]
    assert all(b.mask() is None for b in plan.buckets)
    assert sorted(plan.restore_order.tolist()) == list(range(242))


def test_lengths_that_do_not_add_up_are_refused() -> None:
    q, k, v = random_qkv(9)
    with pytest.raises(ValueError, match=r"describe 7 tokens, but 9 x 1"):
        attention()(q, k, v, packed_seq_params=packed_params([3, 4]))


def test_a_length_that_context_parallelism_cannot_cut_is_refused() -> None:
    from opd.megatron_backend.layers import pack_plan

    with pytest.raises(ValueError, match=r"sequence of 6 tokens.*multiple of 4"):
        pack_plan((8, 6), 2, 0, torch.device("cpu"))


def test_rms_norm_by_hand_and_its_mark_for_sequence_parallelism() -> None:
    from opd.megatron_backend.layers import RMSNorm

    config = SimpleNamespace(use_cpu_initialization=True, params_dtype=torch.float64, sequence_parallel=True)
    norm = RMSNorm(config, 2, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0], dtype=torch.float64)
    # mean square of (3, 4) is 12.5; plus 0.5 is 13
    expected = torch.tensor([3.0, 8.0], dtype=torch.float64) / 13**0.5
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0], dtype=torch.float64)), expected)
    assert norm.weight.sequence_parallel is True
