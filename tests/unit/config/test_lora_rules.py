"""What the adapter flags refuse, word by word."""

from __future__ import annotations

import pytest

from opd.config.flags import parse_flags
from opd.config.lora_rules import lora_rules

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--lora-rank 8",
        "--lora-rank 8 --lora-alpha 4.5 --lora-target-modules linear_qkv linear_fc2",
    ],
)
def test_accepted(flags: str) -> None:
    assert list(lora_rules(parse_flags(flags.split()))) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--lora-alpha 16",
            "`--lora-alpha=16.0` needs `--lora-rank`: without it all weights are trained. Give a rank such as 16, or "
            "drop the flag.",
        ),
        (
            "--lora-target-modules linear_qkv",
            "`--lora-target-modules linear_qkv` needs `--lora-rank`: without it all weights are trained. Give a rank "
            "such as 16, or drop the flag.",
        ),
        (
            "--lora-rank 0",
            "`--lora-rank=0` must be at least 1. Give 16, or drop the --lora flags to train all weights.",
        ),
        (
            "--lora-rank 8 --lora-alpha 0",
            "`--lora-alpha=0.0` must be greater than 0: adapters are scaled by alpha / rank. Leave it out for twice "
            "the rank.",
        ),
        (
            "--lora-rank 8 --lora-alpha nan",
            "`--lora-alpha=nan` must be greater than 0: adapters are scaled by alpha / rank. Leave it out for twice "
            "the rank.",
        ),
        (
            "--lora-rank 8 --lora-target-modules q_proj",
            "`--lora-target-modules q_proj`: `q_proj` is no layer that takes an adapter. Give `linear_qkv`, "
            "Megatron's layer with it, or leave the flag out for all of them.",
        ),
        (
            "--lora-rank 8 --lora-target-modules linear_fc1 embedding",
            "`--lora-target-modules linear_fc1 embedding`: `embedding` is no layer that takes an adapter. Give some "
            "of linear_qkv linear_proj linear_fc1 linear_fc2, or leave the flag out for all of them.",
        ),
        (
            "--lora-rank 8 --lora-target-modules linear_fc1 linear_fc1",
            "`--lora-target-modules linear_fc1 linear_fc1` names `linear_fc1` twice. Drop one.",
        ),
    ],
)
def test_refused(flags: str, message: str) -> None:
    assert list(lora_rules(parse_flags(flags.split()))) == [message]
