"""How many numbers low-rank adapters add and train, worked out from shapes."""

from __future__ import annotations

from opd.config.lora_rules import TARGET_MODULES
from opd.config.model_facts import ModelFacts
from opd.config.schema import LoraFlags


def adapter_parameters_per_rank(facts: ModelFacts, lora: LoraFlags, *, tp: int = 1, pp: int = 1) -> int:
    """Trained numbers of one rank: these, not the weights, have gradients and optimizer state. 0 without --lora-rank.

    Of a layer with I inputs and O outputs: rank x (I + O), where TP splits the side that it splits in the weight.
    """
    if lora.lora_rank is None:
        return 0
    queries, kv = facts.num_attention_heads * facts.kv_channels, facts.num_query_groups * facts.kv_channels
    split_and_whole = {
        "linear_qkv": (queries + 2 * kv, facts.hidden_size),
        "linear_proj": (queries, facts.hidden_size),
        "linear_fc1": (2 * facts.ffn_hidden_size, facts.hidden_size),
        "linear_fc2": (facts.ffn_hidden_size, facts.hidden_size),
    }
    targets = [split_and_whole[name] for name in lora.lora_target_modules or TARGET_MODULES]
    return facts.num_layers // pp * lora.lora_rank * sum(split // tp + whole for split, whole in targets)
