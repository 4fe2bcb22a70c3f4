"""Floating-point operations of a decoder, from its shape and from how many tokens it reads.

A multiplication and an addition are two operations. A matrix of n numbers costs 2 n per token forward and 4 n backward
(the input's gradient and the weight's), as in arXiv 2001.08361, section 2.1; causal attention costs 4 x heads x
dimensions for every pair of a position and one that it looks at (scores, then the weighted sum of values) forward and
twice that backward. Left out: norms, activations, softmax and the optimizer, each linear in its tensor and together
below a percent at real sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opd.config.model_facts import ModelFacts


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a pass computes.

    Args:
        tokens: positions that go through the layers.
        pairs: positions times those that each looks at, itself included.
        head_tokens: positions whose logits are computed.
    """

    tokens: float = 0
    pairs: float = 0
    head_tokens: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            tokens=self.tokens + other.tokens,
            pairs=self.pairs + other.pairs,
            head_tokens=self.head_tokens + other.head_tokens,
        )

    def __mul__(self, times: float) -> Work:
        return Work(tokens=self.tokens * times, pairs=self.pairs * times, head_tokens=self.head_tokens * times)


def work_of(lengths: Iterable[int], head_lengths: Iterable[int]) -> Work:
    """Of whole sequences: ``lengths`` in tokens, and how many tokens of each have their logits computed."""
    lengths = list(lengths)
    return Work(
        tokens=sum(lengths), pairs=sum(n * (n + 1) // 2 for n in lengths), head_tokens=sum(int(n) for n in head_lengths)
    )


def writing_work(prompt: float, response: float, *, samples: float = 1, prompts: float | None = None) -> Work:
    """Of writing ``samples`` answers, every earlier token in a cache.

    Args:
        prompts: how often a prompt is read; once per sample without it, less where samples share a prefix cache.
    """
    reads = samples if prompts is None else prompts
    reading = Work(tokens=prompt, pairs=prompt * (prompt + 1) / 2, head_tokens=0) * reads
    pairs = response * prompt + response * (response + 1) / 2
    return reading + Work(tokens=response, pairs=pairs, head_tokens=response) * samples


def matrix_parameters(facts: ModelFacts) -> int:
    """Numbers of one layer's matrices that one token meets."""
    norms = 2 * facts.hidden_size + (2 * facts.kv_channels if facts.qk_layernorm else 0)
    unvisited = facts.num_experts - facts.moe_router_topk
    return facts.layer_parameters - norms - unvisited * 3 * facts.hidden_size * facts.moe_ffn_hidden_size


def body_flops(facts: ModelFacts, work: Work) -> float:
    """Forward through the layers, without the output matrix."""
    return facts.num_layers * (2 * matrix_parameters(facts) * work.tokens + _attention_per_pair(facts) * work.pairs)


def head_flops(facts: ModelFacts, work: Work) -> float:
    """Forward through the output matrix."""
    return 2 * facts.embedding_parameters * work.head_tokens


def forward_flops(facts: ModelFacts, work: Work) -> float:
    """Of scoring, or of writing (``writing_work``)."""
    return body_flops(facts, work) + head_flops(facts, work)


def training_flops(
    facts: ModelFacts,
    work: Work,
    *,
    recomputes_layers: bool = False,
    recomputes_logits: bool = True,
    trains_weights: bool = True,
    has_head: bool = True,
) -> float:
    """Forward and backward.

    Args:
        recomputes_layers: all layers run forward once more (full activation recomputation).
        recomputes_logits: so do the logits, chunk by chunk; a loss on whole distributions makes its gradient in the
            forward pass instead.
        trains_weights: False with adapters: frozen matrices pass gradients on and get none. The adapters' own work,
            about rank / hidden of that, is left out.
        has_head: False for a critic.
    """
    body = body_flops(facts, work)
    attention = facts.num_layers * _attention_per_pair(facts) * work.pairs
    matrices = body - attention
    per_matrix = 2 if trains_weights else 1
    total = body + 2 * attention + per_matrix * matrices + (body if recomputes_layers else 0)
    if has_head:
        total += head_flops(facts, work) * (1 + per_matrix + (1 if recomputes_logits else 0))
    return total


def _attention_per_pair(facts: ModelFacts) -> int:
    return 4 * facts.num_attention_heads * facts.kv_channels
