"""Attention of new tokens over a cached prefix, on a CPU, without computing the prefix again.

SGLang 0.5.23's ``torch_native`` backend pads the queries of new tokens to the length of the whole sequence, computes
attention for every position and keeps the new ones: 64 new tokens behind a cached prompt of 1,536 cost as much
attention as all 1,600. GPU backends do not. Here only the new rows are computed; the results are the same numbers.

Shape legend: N new tokens of all sequences of a step, Q new tokens and S tokens of one sequence, H heads, D head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

logger = logging.getLogger(__name__)

_TARGET = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_extend"


def install() -> None:
    """To be called before SGLang loads its plugins, in every process that computes. Idempotent."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource(plugin_name="opd cpu attention", dist_name=None)
    HookRegistry.register(_TARGET, extend_attention, HookType.AROUND, source=source)


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


@functools.cache
def _log_once() -> None:
    """At first use: plugins are loaded before SGLang sets its logging up."""
    logger.info("attention of new tokens over cached prefixes by %s", __name__)


def _new_rows_mask(new: int, length: int, device: torch.device) -> torch.Tensor:
    """[Q, S]: what each of the last ``new`` tokens of a sequence sees; torch's ``is_causal`` would align the first."""
    return torch.ones(new, length, dtype=torch.bool, device=device).tril(length - new)
