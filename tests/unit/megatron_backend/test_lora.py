"""Adapters against a plain implementation: transformers' own model with W + scale * B A in place of each W."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import VOCAB_SIZE, write_tiny_model

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]

RANK, ALPHA = 3, 7.5  # scale 2.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """qwen2 has biases in q, k and v; in qwen3 the heads are wider than hidden size / heads."""
    root = tmp_path_factory.mktemp("models")
    for family, tied in (("qwen2", True), ("qwen3", False)):
        write_tiny_model(root / family, family, tied=tied)
    return {family: root / family for family in ("qwen2", "qwen3")}


def build(folder: Path, *, dtype: torch.dtype = torch.float32, adapted: bool = True, trained: bool = True, **options):
    """A model with adapters, whose B is not 0 if ``trained``."""
    from opd.megatron_backend import hf_bridge, lora
    from opd.megatron_backend.groups import ParallelSizes

    recompute = {k: options.pop(k) for k in list(options) if k.startswith("recompute")}
    model = hf_bridge.build_model(hf_bridge.read_hf_config(folder), ParallelSizes(), dtype=dtype, **recompute)
    hf_bridge.load_hf_weights(model, folder)
    if adapted:
        lora.add_adapters(model, **({"rank": RANK, "alpha": ALPHA} | options))
        if trained:
            generator = torch.Generator().manual_seed(9)
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(3))


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(tokens(), torch.arange(24).expand(2, 24), None)


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens().roll(-1, 1).flatten())


def base_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.endswith(("lora_a", "lora_b"))}


def merged_export(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    from opd.megatron_backend.lora import merged_view

    return dict(model.bridge.export_weights([merged_view(model)]))


def merge_by_hand(
    weights: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], scale: float
) -> dict[str, torch.Tensor]:
    merged = dict(weights)
    for name in adapter:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b_OR = adapter[name.replace("lora_A", "lora_B")]
            merged[f"{module}.weight"] = weights[f"{module}.weight"] + scale * b_OR @ adapter[name]
    return merged


def transformers_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_change_nothing(folders: dict[str, Path], dtype: torch.dtype) -> None:
    plain, fresh = (build(folders["qwen2"], dtype=dtype, adapted=a, trained=False) for a in (False, True))
    assert torch.equal(logits_of(fresh), logits_of(plain))
    trained = build(folders["qwen2"], dtype=dtype)
    assert (logits_of(trained) - logits_of(plain)).abs().max() > 0.1
    adapter = {n: p for n, p in fresh.named_parameters() if p.requires_grad}
    assert len(adapter) == 2 * 4 * 2 and all(name.endswith(("lora_a", "lora_b")) for name in adapter)
    assert all(p.dtype is dtype for p in adapter.values())


def test_a_is_drawn_anew_for_each_layer_and_target_and_by_seed(folders: dict[str, Path]) -> None:
    first, same, other = (
        {n: p for n, p in build(folders["qwen3"], trained=False, seed=seed).named_parameters() if n.endswith("lora_a")}
        for seed in (5, 5, 6)
    )
    assert all(torch.equal(first[n], same[n]) and not torch.equal(first[n], other[n]) for n in first)
    wide = [a.flatten() for a in first.values() if a.shape == (RANK, 64)]  # qkv and fc1 of two layers
    assert len({tuple(a.tolist()) for a in wide}) == len(wide) == 4
    # Uniform on +-1/sqrt(I): the largest is close to the bound, the variance is 1 / (3 I).
    values = torch.cat(wide) * 8
    assert 0.95 < values.abs().max() <= 1 and values.var().item() == pytest.approx(1 / 3, rel=0.15)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_a_dense_implementation(folders: dict[str, Path], family: str, recompute: bool) -> None:
    from opd.megatron_backend.peft_export import peft_tensors

    options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = build(folders[family], **(options if recompute else {})).train()
    reference = transformers_model(folders[family])
    leaves = {name: tensor.requires_grad_() for name, tensor in peft_tensors(model).items()}
    weights = {name: tensor.detach() for name, tensor in reference.state_dict().items()}
    wanted_logits = torch.func.functional_call(
        reference, merge_by_hand(weights, leaves, ALPHA / RANK), (tokens(),), tie_weights=False
    ).logits
    loss_of(wanted_logits).backward()

    logits = logits_of(model)
    torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=1e-5)
    loss_of(logits).backward()
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert max(p.grad.abs().max() for p in trained) > 1e-3
    for parameter in trained:
        parameter.data = parameter.grad
    got, wanted = peft_tensors(model), {name: leaf.grad for name, leaf in leaves.items()}
    for modules in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",)):
        for name in [n for n in got if f"{modules[0]}.lora_A" in n]:
            shared = sum(wanted[name.replace(modules[0], module)] for module in modules)  # one A for all of them
            torch.testing.assert_close(got[name], shared, rtol=0, atol=1e-5)
    for name in (n for n in got if "lora_B" in n):
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-5)


def make_trainable(model: torch.nn.Module, *flags: str) -> Any:
    from opd.config.flags import parse_flags
    from opd.megatron_backend import optimizer

    return optimizer.make_trainable(model, parse_flags(["--lr", "1e-2", *flags]), total_optimizer_steps=10)


def steps(trainable: Any, number: int) -> list[float]:
    losses = []
    for _ in range(number):
        trainable.model.zero_grad_buffer()
        trainable.optimizer.zero_grad()
        loss = loss_of(logits_of(trainable.model))
        loss.backward()
        trainable.model.finish_grad_sync()
        ok, _, _ = trainable.optimizer.step()
        assert ok
        trainable.scheduler.step(increment=1)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("flags", [[], ["--use-distributed-optimizer"], ["--bf16", "--use-distributed-optimizer"]])
def test_training_moves_adapters_alone_and_holds_state_for_nothing_else(
    folders: dict[str, Path], flags: list[str]
) -> None:
    model = build(folders["qwen2"], dtype=torch.bfloat16 if "--bf16" in flags else torch.float32, trained=False)
    before = base_parameters(model)
    trainable = make_trainable(model, *flags)
    losses = steps(trainable, 6)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_parameters(model).items())
    adapters = {n: p for n, p in model.named_parameters() if n not in before}
    assert all(p.abs().max() > 0 for p in adapters.values())
    trained = sum(p.numel() for p in adapters.values())
    buffered = sum(buffer.grad_data.numel() for buffer in trainable.model.buffers)
    assert trained <= buffered < trained + 256  # padded for sharding
    assert buffered < sum(p.numel() for p in before.values()) / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_exported_weights_are_merged_and_the_base_is_only_read(
    folders: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    from opd.megatron_backend.lora import merged_view
    from opd.megatron_backend.peft_export import peft_tensors

    model = build(folders[family], dtype=dtype)
    before = base_parameters(model)
    plain = build(folders[family], dtype=dtype, adapted=False)
    # The order too is that of a model without adapters, which a moving average of the merged weights goes by.
    assert [n for n, _ in merged_view(model).named_parameters()] == [n for n, _ in plain.named_parameters()]
    exported, weights = merged_export(model), merged_export(plain)
    adapter = {name: tensor.float() for name, tensor in peft_tensors(model).items()}
    wanted = merge_by_hand({name: tensor.float() for name, tensor in weights.items()}, adapter, ALPHA / RANK)
    assert exported.keys() == wanted.keys()
    for name, tensor in exported.items():
        assert tensor.dtype is dtype
        assert "proj" not in name or "bias" in name or not torch.equal(tensor, weights[name])
        torch.testing.assert_close(
            tensor, wanted[name].to(dtype), rtol=1e-2 if dtype is torch.bfloat16 else 0, atol=1e-6
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_parameters(model).items())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_saved_adapter_merges_into_the_transformers_model(
    tmp_path: Path, folders: dict[str, Path], family: str
) -> None:
    from opd.megatron_backend.peft_export import save_peft_adapter

    model = build(folders[family]).eval()
    save_peft_adapter(model, tmp_path / "peft", base_model_name_or_path=str(folders[family]))
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folders[family])
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2
    reference = transformers_model(folders[family])
    merged = merge_by_hand(reference.state_dict(), adapter, config["lora_alpha"] / config["r"])
    reference.load_state_dict(merged)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model), reference(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [None, ["linear_proj", "linear_qkv"]])
def test_peft_itself_loads_the_adapter(tmp_path: Path, folders: dict[str, Path], targets: list[str] | None) -> None:
    peft = pytest.importorskip("peft")
    from opd.megatron_backend.peft_export import save_peft_adapter

    model = build(folders["qwen3"], target_modules=targets).eval()
    save_peft_adapter(model, tmp_path, base_model_name_or_path=str(folders["qwen3"]))
    reference = peft.PeftModel.from_pretrained(transformers_model(folders["qwen3"]), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model), reference(tokens()).logits, rtol=0, atol=1e-5)


def test_target_modules_choose_the_layers(folders: dict[str, Path]) -> None:
    from opd.megatron_backend.lora import adapter_spec

    model = build(folders["qwen3"], alpha=None, target_modules=["linear_fc2", "linear_qkv"])
    owners = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert owners == {"linear_qkv", "linear_fc2"}
    spec = adapter_spec(model)
    assert spec is not None and spec.scale == 2.0
    assert spec.flags() == "--lora-rank 3 --lora-alpha 6 --lora-target-modules linear_qkv linear_fc2"


@pytest.mark.parametrize("targets", [None, ["linear_qkv"], ["linear_proj"], ["linear_fc1"], ["linear_fc2"]])
def test_the_plan_counts_the_trained_numbers(folders: dict[str, Path], targets: list[str] | None) -> None:
    from opd.config.lora_size import adapter_parameters_per_rank
    from opd.config.model_facts import read_model_facts
    from opd.config.schema import LoraFlags

    model = build(folders["qwen3"], target_modules=targets)
    flags = LoraFlags(lora_rank=RANK, lora_target_modules=targets)
    counted = adapter_parameters_per_rank(read_model_facts(str(folders["qwen3"]), flag="--hf-checkpoint"), flags)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_layers_that_are_not_megatron_cores_own_are_refused(folders: dict[str, Path]) -> None:
    from opd.megatron_backend.lora import AdapterError, add_adapters

    model = build(folders["qwen3"])
    with pytest.raises(AdapterError, match=r"linear_qkv of layer 1 is a .*_AdaptedColumn: adapters go on .* once"):
        add_adapters(model, rank=2)


def test_a_plain_model_has_no_adapter_to_export(tmp_path: Path, folders: dict[str, Path]) -> None:
    from opd.megatron_backend.lora import AdapterError, merged_view
    from opd.megatron_backend.peft_export import save_peft_adapter

    model = build(folders["qwen3"], adapted=False)
    assert merged_view(model) is model
    with pytest.raises(AdapterError, match="--lora-rank adds them"):
        save_peft_adapter(model, tmp_path, base_model_name_or_path="base")


@pytest.mark.parametrize("flags", [[], ["--bf16", "--use-distributed-optimizer"]])
def test_a_resumed_run_is_the_run_that_went_on(tmp_path: Path, folders: dict[str, Path], flags: list[str]) -> None:
    from opd.megatron_backend import checkpoint

    dtype = torch.bfloat16 if flags else torch.float32
    first = make_trainable(build(folders["qwen2"], dtype=dtype, trained=False), *flags)
    steps(first, 2)
    path = checkpoint.save(tmp_path, 2, model=first.model, optimizer=first.optimizer, scheduler=first.scheduler)
    expected = steps(first, 2)
    second = make_trainable(build(folders["qwen2"], dtype=dtype, trained=False, seed=77), *flags)
    checkpoint.load(tmp_path, model=second.model, optimizer=second.optimizer, scheduler=second.scheduler)
    assert steps(second, 2) == expected
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    from megatron.core import dist_checkpointing

    keys = dist_checkpointing.load_tensors_metadata(str(path)).keys()
    assert keys and all("lora_" in key for key in keys)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    from opd.megatron_backend import checkpoint

    adapted, plain = build(folders["qwen3"]), build(folders["qwen3"], adapted=False)
    checkpoint.save(tmp_path / "adapters", 1, model=adapted)
    checkpoint.save(tmp_path / "whole", 1, model=plain)
    for model, folder, message in (
        (build(folders["qwen3"], alpha=3.0), "adapters", r"other adapters than `--lora-rank 3 --lora-alpha 3 .*Resume"),
        (build(folders["qwen3"], rank=5), "adapters", r"Resume it with `--lora-rank 3 --lora-alpha 7.5 --lora-target"),
        (plain, "adapters", r"low-rank adapters without the weights they belong to.*`--lora-rank 3"),
        (adapted, "whole", r"whole weights and no adapters. Give it with --ref-load"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.load(tmp_path / folder, model=model)
    with pytest.raises(checkpoint.CheckpointError, match="without the weights they belong to"):
        checkpoint.weights_dtype(checkpoint.resolve(tmp_path / "adapters"))
