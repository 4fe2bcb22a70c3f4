"""Attention on a CPU: of new tokens over a cached prefix, and of one token of each of many sequences.

SGLang 0.5.23's ``torch_native`` backend pads the queries of new tokens to the length of the whole sequence, computes
attention for every position and keeps the new ones: 64 new tokens behind a cached prompt of 1,536 cost as much
attention as all 1,600. Here only the new rows are computed. And while it writes, it goes through the sequences one by
one: 128 answers of a small model are 128 tiny calls per layer and token, most of a rollout's time. Here sequences of
about the same length share a call. GPU backends do neither; the results are the same numbers.

Shape legend: N new tokens of all sequences of a step (when writing one each, so N sequences), Q new tokens and S tokens
of one sequence (S of the longest where they share a call), H heads, D head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

logger = logging.getLogger(__name__)

_BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
# Sequences share a call where its overhead counts: at least so many, none with more numbers in its keys than these
# (64 tokens of Qwen3-0.6B, 512 of the laptop task's student), and not more of them together.
TOGETHER_SEQUENCES = 4
LARGEST_KEYS = 1 << 16
TOGETHER_KEYS = 1 << 19


def install() -> None:
    """To be called before SGLang loads its plugins, in every process that computes. Idempotent."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource(plugin_name="opd cpu attention", dist_name=None)
    for name, ours in (("extend", extend_attention), ("decode", decode_attention)):
        HookRegistry.register(f"{_BACKEND}._run_sdpa_forward_{name}", ours, HookType.AROUND, source=source)


def extend_attention(
    original: Callable[..., torch.Tensor],
    backend: Any,
    query_NHD: torch.Tensor,
    output_NHD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    enable_gqa: bool = False,
    causal: bool = False,
    sliding_window_size: int | None = None,
    **rest: Any,
) -> torch.Tensor:
    """``original`` with its own arguments, but for plain causal attention. Writes ``output_NHD`` and returns it.

    Args:
        key_cache, value_cache: [cache slots, key heads, D].
        req_to_token: the cache slot of each request's tokens, by row ``req_pool_indices``.
        seq_lens: S of each sequence, ``extend_prefix_lens`` cached and ``extend_seq_lens`` new.
    """
    if encoder_lens is not None or not causal or sliding_window_size not in (None, -1):
        return original(
            backend, query_NHD, output_NHD, key_cache, value_cache, req_to_token, req_pool_indices, seq_lens,
            extend_prefix_lens, extend_seq_lens, encoder_lens, scaling=scaling, enable_gqa=enable_gqa, causal=causal,
            sliding_window_size=sliding_window_size, **rest,
        )  # fmt: skip
    _log_once()
    sequences = zip(
        req_pool_indices.tolist(), seq_lens.tolist(), extend_prefix_lens.tolist(), extend_seq_lens.tolist(), strict=True
    )
    first = 0
    for request, length, cached, new in sequences:
        slots_S = req_to_token[request, :length]
        query_HQD = query_NHD[first : first + new].movedim(0, 1)
        out_HQD = scaled_dot_product_attention(
            query_HQD[None],
            key_cache[slots_S].movedim(0, 1)[None].to(query_NHD.dtype),
            value_cache[slots_S].movedim(0, 1)[None].to(query_NHD.dtype),
            attn_mask=_new_rows_mask(new, length, query_HQD.device) if cached else None,
            is_causal=not cached,
            scale=scaling,
            enable_gqa=enable_gqa,
        )[0]
        output_NHD[first : first + new] = out_HQD.movedim(1, 0)
        first += new
    return output_NHD


def decode_attention(
    original: Callable[..., torch.Tensor],
    backend: Any,
    query_NHD: torch.Tensor,
    output_NHD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    enable_gqa: bool = False,
    sliding_window_size: int | None = None,
    **rest: Any,
) -> torch.Tensor:
    """``original`` with its own arguments, but for plain attention of several short sequences, in which each new token
    sees its whole sequence. Writes ``output_NHD`` and returns it.

    Args:
        key_cache, value_cache, req_to_token, seq_lens: see ``extend_attention``.
    """
    lengths = seq_lens.tolist()
    token_numbers = key_cache[0].numel()
    large = len(lengths) < TOGETHER_SEQUENCES or max(lengths) * token_numbers > LARGEST_KEYS
    if large or encoder_lens is not None or sliding_window_size not in (None, -1):
        return original(
            backend, query_NHD, output_NHD, key_cache, value_cache, req_to_token, req_pool_indices, seq_lens,
            encoder_lens, scaling=scaling, enable_gqa=enable_gqa, sliding_window_size=sliding_window_size, **rest,
        )  # fmt: skip
    for part in _alike(lengths, TOGETHER_KEYS // token_numbers):
        longest = lengths[part[-1]]
        part_N = torch.tensor(part)
        seen_NS = torch.arange(longest) < seq_lens[part_N, None]
        slots_NS = req_to_token[req_pool_indices[part_N], :longest]
        slots_NS = torch.where(seen_NS, slots_NS, slots_NS[:, :1])  # what is not seen must be a number all the same
        out_NHQD = scaled_dot_product_attention(
            query_NHD[part_N, :, None],
            key_cache[slots_NS].transpose(1, 2).to(query_NHD.dtype),
            value_cache[slots_NS].transpose(1, 2).to(query_NHD.dtype),
            attn_mask=seen_NS[:, None, None],
            scale=scaling,
            enable_gqa=enable_gqa,
        )
        output_NHD[part_N] = out_NHQD[:, :, 0]
    return output_NHD


def _alike(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Places of the sequences, from the shortest on, in parts that have at most ``tokens`` when each sequence is filled
    up to the part's longest, which is the last one."""
    part: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and (len(part) + 1) * lengths[place] > tokens:
            yield part
            part = []
        part.append(place)
    if part:
        yield part


@functools.cache
def _log_once() -> None:
    """At first use: plugins are loaded before SGLang sets its logging up."""
    logger.info("attention by %s", __name__)


def _new_rows_mask(new: int, length: int, device: torch.device) -> torch.Tensor:
    """[Q, S]: what each of the last ``new`` tokens of a sequence sees; torch's ``is_causal`` would align the first."""
    return torch.ones(new, length, dtype=torch.bool, device=device).tril(length - new)
