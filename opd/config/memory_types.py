"""One row of the memory plan, and the sizes that several of its files use."""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.model_facts import ModelFacts
from opd.config.model_rules import max_context_len
from opd.config.schema import Config

FP32 = 4  # bytes
DEFAULT_PROMPT = 512  # tokens, where no flag says how long prompts are


@dataclass(frozen=True, kw_only=True)
class MemoryItem:
    """
    Args:
        phase: the part of a step that needs it: rollout, scoring, training, optimizer or sync; None: always there.
        on_host: in main memory, also where the device is a GPU.
    """

    name: str
    bytes: int
    note: str
    phase: str | None = None
    on_host: bool = False


def element_bytes(config: Config) -> int:
    return 2 if config.model.bf16 else FP32


def kind(config: Config) -> str:
    return "bf16" if config.model.bf16 else "fp32"


def planned_prompt(config: Config, facts: ModelFacts) -> int:
    """Tokens of a prompt, which leaves room for the longest answer."""
    given = config.plan.plan_prompt_len or config.data.rollout_max_prompt_len or DEFAULT_PROMPT
    return max(1, min(given, max_context_len(config, facts) - config.rollout.rollout_max_response_len))


def planned_sequence(config: Config, facts: ModelFacts) -> int:
    """Tokens of a prompt and the longest answer, within the context."""
    prompt = config.data.rollout_max_prompt_len or planned_prompt(config, facts)
    return min(max_context_len(config, facts), prompt + config.rollout.rollout_max_response_len)
