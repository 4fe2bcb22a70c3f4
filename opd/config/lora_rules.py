"""Rules of the adapter flags (--lora-*)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from opd.config.flags import flag_text
from opd.config.schema import Config

# Megatron's names: fused q, k and v; attention output; fused gate and up; down.
TARGET_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
# The same layers as adapter libraries for Hugging Face models name them.
_HF_NAMES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj", "gate_up_proj"),
    "linear_fc2": ("down_proj",),
}


def lora_rules(config: Config) -> Iterator[str]:
    lora = config.lora
    if lora.lora_rank is None:
        for name in ("lora_alpha", "lora_target_modules"):
            if (value := getattr(lora, name)) is not None:
                yield (
                    f"{flag_text(name, value)} needs `--lora-rank`: without it all weights are trained. Give a rank "
                    "such as 16, or drop the flag."
                )
        return
    if lora.lora_rank < 1:
        rank = flag_text("lora_rank", lora.lora_rank)
        yield f"{rank} must be at least 1. Give 16, or drop the --lora flags to train all weights."
    if lora.lora_alpha is not None and not (lora.lora_alpha > 0 and math.isfinite(lora.lora_alpha)):
        yield (
            f"{flag_text('lora_alpha', lora.lora_alpha)} must be greater than 0: adapters are scaled by alpha / rank. "
            "Leave it out for twice the rank."
        )
    yield from _target_rules(lora.lora_target_modules)


def _target_rules(targets: list[str] | None) -> Iterator[str]:
    for name in targets or []:
        if name in TARGET_MODULES:
            continue
        same = next((ours for ours, theirs in _HF_NAMES.items() if name in theirs), None)
        remedy = f"Give `{same}`, Megatron's layer with it" if same else f"Give some of {' '.join(TARGET_MODULES)}"
        yield (
            f"{flag_text('lora_target_modules', targets)}: `{name}` is no layer that takes an adapter. {remedy}, or "
            "leave the flag out for all of them."
        )
    for name in sorted({name for name in targets or [] if (targets or []).count(name) > 1}):
        yield f"{flag_text('lora_target_modules', targets)} names `{name}` twice. Drop one."
