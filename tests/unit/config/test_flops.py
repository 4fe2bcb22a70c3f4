"""Operations of a small decoder, counted by hand and by torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.config.flops import Work, body_flops, forward_flops, training_flops, work_of, writing_work
from opd.config.model_facts import ModelFacts, read_model_facts

from .conftest import write_model


@pytest.fixture
def facts(tmp_path: Path) -> ModelFacts:
    """2 layers of hidden 64: Q 64x128, K and V 64x64, output 128x64, MLP 3 x 64x128; table 320x64."""
    write_model(tmp_path / "model")
    return read_model_facts(str(tmp_path / "model"), flag="--hf-checkpoint")


def test_work_of_sequences() -> None:
    assert work_of([3, 5], [2, 4]) == Work(tokens=8, pairs=6 + 15, head_tokens=6)
    # One answer of 4 tokens after a prompt of 3: the same positions and pairs as the whole sequence read at once.
    assert writing_work(3, 4) == Work(tokens=7, pairs=28, head_tokens=4)
    # Two answers to one prompt that is read once.
    assert writing_work(3, 4, samples=2, prompts=1) == Work(tokens=11, pairs=6 + 2 * (12 + 10), head_tokens=8)


def test_forward_and_backward_by_hand(facts: ModelFacts) -> None:
    work = work_of([10], [4])
    matrices = 2 * 2 * (64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 128) * 10
    attention = 2 * 4 * 128 * 55
    head = 2 * 320 * 64 * 4
    assert forward_flops(facts, work) == matrices + attention + head
    assert training_flops(facts, work) == 3 * (matrices + attention) + 4 * head
    full = training_flops(facts, work, recomputes_layers=True, recomputes_logits=False)
    assert full == 4 * (matrices + attention) + 3 * head
    # Frozen matrices: no gradient of the weights, attention's backward as before; the head's logits come again.
    assert training_flops(facts, work, trains_weights=False) == 2 * matrices + 3 * attention + 3 * head
    assert training_flops(facts, work, has_head=False) == 3 * (matrices + attention)


def test_experts_count_as_visited(tmp_path: Path) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    write_model(tmp_path / "moe", model_type="qwen3_moe", **experts)
    facts = read_model_facts(str(tmp_path / "moe"), flag="--hf-checkpoint")
    one = Work(tokens=1, pairs=0, head_tokens=0)
    assert body_flops(facts, one) == 2 * 2 * (64 * 128 + 2 * 64 * 64 + 128 * 64 + 8 * 64 + 2 * 3 * 64 * 32)
    assert facts.parameter_count - facts.active_parameter_count == 2 * 6 * 3 * 64 * 32


def test_the_same_as_torch_counts(facts: ModelFacts) -> None:
    """``FlopCounterMode`` sees every matrix product of transformers' model; it counts the whole square of attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from opd.torchvision_ops import define_missing_ops

    define_missing_ops()
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(facts.source.parent), attn_implementation="eager"
    )
    length = 12
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.arange(length)[None], use_cache=False).logits
    square = Work(tokens=length, pairs=length * length, head_tokens=length)
    assert counter.get_total_flops() == forward_flops(facts, square)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    # Both factors of every product have a gradient, each as costly as the product.
    assert counter.get_total_flops() == 2 * forward_flops(facts, square)
