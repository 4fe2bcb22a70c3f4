"""The plan's bytes of weights, gradients, optimizer states and kept activations, against the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.config import parse_config
from opd.config.activations import layer_values
from opd.config.devices import DEVICES
from opd.config.layout import student_layout
from opd.config.memory import rank_memory
from opd.config.memory_training import kernels_of
from opd.config.model_rules import student_facts
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.usefixtures("single_process")
LENGTH = 48


def config_of(folder: Path, flags: str) -> Any:
    (folder / "prompts.jsonl").write_text('{"input": "1", "label": "1"}\n')
    required = "--num-rollout 1 --rollout-batch-size 2 --rollout-max-response-len 8 --n-samples-per-prompt 2"
    required += " --rm-type exact --label-key label"
    return parse_config(
        ["--hf-checkpoint", str(folder), "--prompt-data", str(folder / "prompts.jsonl"), *required.split(), "--dry-run",
         "--plan-device", "cpu", *flags.split()]
    )  # fmt: skip


def build(config: Any, num_layers: int | None = None) -> torch.nn.Module:
    from opd.megatron_backend.groups import ParallelSizes
    from opd.megatron_backend.hf_bridge import build_model, read_hf_config
    from opd.megatron_backend.lora import add_adapters

    hf_config = read_hf_config(config.checkpoint.hf_checkpoint)
    if num_layers is not None:
        hf_config.num_hidden_layers = num_layers
    lora = config.lora.lora_rank
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    model = build_model(hf_config, ParallelSizes(), dtype=dtype, random_init=True, transformer_engine=lora is None)
    if lora is not None:
        add_adapters(model, rank=lora)
    return model


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("flags", ["", "--bf16", "--lora-rank 3", "--bf16 --use-distributed-optimizer"])
def test_models_and_optimizer_to_the_byte(tmp_path: Path, family: str, flags: str) -> None:
    from opd.megatron_backend.optimizer import make_trainable

    write_tiny_model(tmp_path, family, tied=family == "llama")
    config = config_of(tmp_path, flags)
    trainable = make_trainable(build(config), config, total_optimizer_steps=1)
    for parameter in trainable.model.parameters():
        if parameter.requires_grad:
            parameter.main_grad.zero_()
    trainable.optimizer.step()

    planned = {item.name: item.bytes for item in rank_memory(config, student_facts(config), []).items}
    weights = sum(p.numel() * p.element_size() for p in trainable.model.parameters())
    gradients = sum(p.main_grad.numel() * 4 for p in trainable.model.parameters() if p.requires_grad)
    assert planned["student weights"] == weights
    assert planned["gradients"] == gradients
    assert planned["optimizer states"] == optimizer_bytes(trainable.optimizer)


def optimizer_bytes(optimizer: Any) -> int:
    """Moments, and fp32 weights where the model's are not."""
    each = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [state for one in each for state in one.optimizer.state.values()]
    moments = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    masters = [
        tensor
        for one in each
        for name in ("fp32_from_float16_groups", "shard_fp32_from_float16_groups")
        for group in getattr(one, name, [])
        for tensor in group
    ]
    return moments + sum(tensor.nbytes for tensor in masters if tensor is not None)


@pytest.mark.parametrize(
    ("family", "flags"), [("qwen3", ""), ("llama", ""), ("qwen3_moe", ""), ("qwen3", "--lora-rank 3")]
)
def test_what_a_layer_keeps_of_a_token(tmp_path: Path, family: str, flags: str) -> None:
    """The difference between models of three layers and of two, so that embedding and last norm do not count."""
    write_tiny_model(tmp_path, family, tied=True)
    config = config_of(tmp_path, flags)
    kept = [kept_bytes(build(config, layers)) for layers in (2, 3)]
    facts = student_facts(config)
    values = layer_values(facts, student_layout(config, facts), kernels_of(config, DEVICES["cpu"]))
    assert kept[1] - kept[0] == 4 * values * LENGTH


def kept_bytes(model: torch.nn.Module) -> int:
    """Of all storages saved for the backward pass, weights excepted."""
    from opd.megatron_backend.packing import pack

    packed = pack([torch.arange(LENGTH)], [LENGTH // 2], device=torch.device("cpu"))
    model.applies_head = False
    with saved_storages({p.untyped_storage().data_ptr() for p in model.parameters()}) as found:
        output = model(packed.input_ids_1P, packed.position_ids_1P, None, packed_seq_params=packed.packed_seq_params)
        assert output.requires_grad
        return sum(found.values())


@contextmanager
def saved_storages(weights: set[int]) -> Iterator[dict[int, int]]:
    found: dict[int, int] = {}
    alive = []  # a freed storage's address could be given to another one

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(storage)
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        yield found
