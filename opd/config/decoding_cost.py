"""Seconds of writing answers: a round that adds a token to every running answer reads the weights and the caches."""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.assumptions import Assumptions
from opd.config.devices import SGLANG_SHARE
from opd.config.flops import Work, forward_flops, writing_work
from opd.config.memory_types import element_bytes
from opd.config.model_facts import ModelFacts
from opd.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Engine:
    """
    Args:
        devices: that share the model.
        running: answers in a round.
        samples, prompts: how many answers it writes, and prompts it reads for them.
    """

    devices: int
    running: int
    samples: int
    prompts: int


def decoding_seconds(facts: ModelFacts, assumed: Assumptions, engine: Engine, *, element: int) -> float:
    """Reading the prompts is bound by arithmetic; a round by reading the weights and the cache, or by arithmetic,
    whichever takes longer. All answers have the average length, and a place that falls empty is filled at once."""
    reading = writing_work(assumed.prompt, 0, samples=0, prompts=engine.prompts)
    batch = min(engine.running, engine.samples)
    rounds = engine.samples / batch * assumed.response
    context = assumed.prompt + assumed.response / 2
    numbers = visited_parameters(facts, batch) + batch * context * facts.kv_values_per_token
    token = forward_flops(facts, Work(tokens=1, pairs=context, head_tokens=1))
    round_seconds = max(numbers * element / assumed.bandwidth, token * batch / assumed.flops)
    return (forward_flops(facts, reading) / assumed.flops + rounds * round_seconds) / engine.devices


def visited_parameters(facts: ModelFacts, tokens: int) -> float:
    """Numbers that a round reads: of E experts those that at least one of the tokens goes to, if it goes to any k with
    the same probability."""
    experts = facts.num_layers * facts.expert_parameters
    if not experts:
        return facts.parameter_count
    untouched = (1 - facts.moe_router_topk / facts.num_experts) ** tokens
    return facts.parameter_count - experts * untouched


def answers_at_once(config: Config, facts: ModelFacts, assumed: Assumptions, *, devices: int) -> int:
    """How many whole samples an SGLang engine's cache holds beside the weights; as many as asked for on a CPU."""
    memory = assumed.device.memory
    if memory is None:
        return config.samples_per_rollout
    share = config.rollout.sglang_mem_fraction_static or SGLANG_SHARE
    free = share * memory * devices - facts.parameter_count * element_bytes(config)
    each = (assumed.prompt + assumed.response) * facts.kv_values_per_token * element_bytes(config)
    return max(0, int(free // each))
