"""How many numbers of a model one rank holds, worked out from shapes.

Projections, tables and experts are split; norms and the router are whole on every tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.layout import RankLayout
from opd.config.model_facts import ModelFacts


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """``experts`` are apart from the rest: fewer ranks hold the same ones."""

    dense: int
    experts: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.experts


def parameters_on_stage(
    facts: ModelFacts, layout: RankLayout, *, stage: int, vocab_multiple: int = 1, head: bool = True
) -> RankParameters:
    """Of one rank of a pipeline stage, counted from 0.

    The embedding is on the first stage; the output matrix on the last, where it is a copy of a tied embedding unless
    both are on one stage.

    Args:
        head: False leaves the output matrix out: a critic has none.
    """
    layers = facts.num_layers // layout.pp
    table = vocabulary_rows(facts, tp=layout.tp, vocab_multiple=vocab_multiple) * facts.hidden_size
    dense = layers * dense_layer_parameters(facts, tp=layout.tp)
    first, last = stage == 0, stage == layout.pp - 1
    if first:
        dense += table
    if last:
        own_matrix = facts.untie_embeddings_and_output_weights or not first
        dense += facts.hidden_size + (table if head and own_matrix else 0)
    return RankParameters(dense=dense, experts=layers * (facts.expert_parameters // (layout.ep * layout.etp)))


def dense_layer_parameters(facts: ModelFacts, *, tp: int) -> int:
    """Of one layer on one rank, without its experts."""
    norms = 2 * facts.hidden_size + (2 * facts.kv_channels if facts.qk_layernorm else 0)
    whole = norms + facts.num_experts * facts.hidden_size  # the router
    return (facts.layer_parameters - facts.expert_parameters - whole) // tp + whole


def vocabulary_rows(facts: ModelFacts, *, tp: int, vocab_multiple: int) -> int:
    """Rows of the table on one rank; in all they are a multiple of ``vocab_multiple * tp``."""
    return -(-facts.vocab_size // (vocab_multiple * tp)) * vocab_multiple
