"""What the layers keep of a micro-batch for the backward pass, and what the output matrix needs, in bytes.

Counted tensor by tensor from what the layers save: megatron-core's without fused activation or RoPE, over Transformer
Engine's norms and attention on a GPU, and over those of ``opd.megatron_backend.layers`` elsewhere. Attention scores
never exist. Symbols, per rank: H hidden, F ffn, q and kv widths of queries and of keys, D dimensions per head, E
experts, k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.layout import RankLayout
from opd.config.model_facts import ModelFacts
from opd.config.parameters import vocabulary_rows
from opd.config.schema import ParallelFlags

FP32 = 4  # bytes
# [chunk, V] fp32 tensors alive at once in the backward pass through the output matrix: logits, their gradient, and what
# makes it, beside the chunk before. A loss on whole distributions turns logits into their gradient in place.
LOGITS_OF_A_TOKEN_LOSS = 5
LOGITS_OF_A_DISTRIBUTION_LOSS = 3


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """
    Args:
        transformer_engine: its norms and attention; else this package's.
        cpu: torch's kernels there keep more: a norm its unscaled output, attention its padded inputs.
        element: bytes of an activation.
        adapter_rank: 0 without adapters; with them a norm, whose weight is frozen, does not keep its unscaled output.
    """

    transformer_engine: bool
    cpu: bool
    element: int
    adapter_rank: int = 0

    @property
    def keeps_unscaled(self) -> bool:
        """Whether a norm keeps what it multiplies with its weight: torch's on a CPU does, for the weight's gradient."""
        return self.cpu and not self.adapter_rank


def layer_values(facts: ModelFacts, layout: RankLayout, kernels: Kernels) -> int:
    """Numbers that one layer keeps of one of this rank's tokens."""
    adapters = 4 * kernels.adapter_rank  # what is between A and B of each
    return _norms(facts, layout, kernels) + _attention(facts, layout, kernels) + _mlp(facts, layout) + adapters


def _norms(facts: ModelFacts, layout: RankLayout, kernels: Kernels) -> int:
    """Of each of two norms its input and its output, which is what the projection behind it reads."""
    kept = 3 if kernels.keeps_unscaled else 2
    return 2 * (kept * facts.hidden_size + 1) // layout.residual_ranks  # and the root mean square


def _attention(facts: ModelFacts, layout: RankLayout, kernels: Kernels) -> int:
    """Queries, keys, values, the output and a number per head; the sines and cosines that turned queries and keys.
    With norms of queries and keys what went into them: the queries, and the whole output of their projection, of which
    the keys are a part. Without Transformer Engine sequences are gathered into padded rows and back, which keeps the
    attention's output twice."""
    heads, groups = max(1, facts.num_attention_heads // layout.tp), max(1, facts.num_query_groups // layout.tp)
    q, kv = heads * facts.kv_channels, groups * facts.kv_channels
    kept = 2 * q + 2 * kv + heads + 4 * facts.kv_channels
    if not kernels.transformer_engine:
        kept += q
    if facts.qk_layernorm:
        kept += q + (q + 2 * kv) + heads + groups + (q + kv if kernels.keeps_unscaled else 0)
    return kept


def _mlp(facts: ModelFacts, layout: RankLayout) -> int:
    """Gate and up as one, activated gate, up again (megatron-core adds an offset of 0 to it) and product: 5 F. With
    experts, of the k that a token visits, what each reads, these and the product before its router weight (6 F), as if
    every rank's experts got the same number of tokens; of the router the scores and a mark for each expert, and the
    places of the k."""
    if not facts.num_experts:
        return 5 * facts.ffn_hidden_size // layout.tp
    visits = facts.moe_router_topk
    expert = facts.hidden_size + 6 * facts.moe_ffn_hidden_size // layout.etp
    return visits * (expert + 6) + facts.num_experts * 5 // 4


def micro_batches_in_flight(layout: RankLayout, *, stage: int) -> float:
    """How many micro-batches' activations of its layers a stage holds at most.

    1F1B: one per stage from this one on. Interleaved, with c pieces per stage: 2 (pp - stage - 1) + (c - 1) pp + 1
    passes through one piece each (arXiv 2104.04473, section 2.2).
    """
    if layout.chunks == 1:
        return layout.pp - stage
    passes = 2 * (layout.pp - stage - 1) + (layout.chunks - 1) * layout.pp + 1
    return passes / layout.chunks


def kept_values(
    facts: ModelFacts, layout: RankLayout, kernels: Kernels, parallel: ParallelFlags, *, stage: int
) -> tuple[float, int]:
    """(numbers kept per token over the stage's layers and micro-batches in flight, those of what one recomputation
    brings back)."""
    layers, whole = facts.num_layers // layout.pp, layer_values(facts, layout, kernels)
    flight = micro_batches_in_flight(layout, stage=stage)
    boundary = facts.hidden_size // layout.residual_ranks
    if parallel.recompute_granularity == "full":
        number = parallel.recompute_num_layers or 1
        if parallel.recompute_method == "block":
            number = min(number, layers)
            return flight * (number * boundary + (layers - number) * whole), whole
        return flight * -(-layers // number) * boundary, min(number, layers) * whole
    if parallel.recompute_granularity == "selective":  # the core attention alone: its own padded copies
        heads = max(1, facts.num_attention_heads // layout.tp)
        again = heads * facts.kv_channels
        return flight * layers * (whole - again), again
    return flight * layers * whole, 0


def logits_bytes(
    facts: ModelFacts, layout: RankLayout, parallel: ParallelFlags, *, tokens: int, vocab_multiple: int, copies: int
) -> int:
    """Of one chunk of response tokens: fp32 logits, their gradient and what is alive beside them."""
    rows = vocabulary_rows(facts, tp=layout.tp, vocab_multiple=vocab_multiple)
    return min(tokens, parallel.logits_chunk_tokens) * copies * FP32 * rows
