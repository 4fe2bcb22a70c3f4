"""Mixture-of-experts models: the same logits as transformers, the same weights back, and the load-balancing loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import VOCAB_SIZE, write_tiny_model

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]

EXPERTS, TOP_K = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_tiny_model(folder, "qwen3_moe", tied=False)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings):
    from opd.megatron_backend import hf_bridge, moe
    from opd.megatron_backend.groups import ParallelSizes

    config = hf_bridge.read_hf_config(folder)
    experts = moe.ExpertSettings(**settings)
    model = hf_bridge.build_model(config, ParallelSizes(), dtype=dtype, experts=experts)
    hf_bridge.load_hf_weights(model, folder)
    return model


def token_ids(length: int = 40) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(3))


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, torch.arange(tokens.size(1))[None], None)


@pytest.mark.parametrize("settings", [{}, {"router_fp32": True}])
def test_logits_agree_with_transformers(folder: Path, settings: dict) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = reference(token_ids()).logits
        got = logits_of(load(folder, **settings).eval(), token_ids())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_comes_back_under_the_name_it_has_in_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    from opd.megatron_backend.hf_bridge import export_hf_weights

    write_tiny_model(tmp_path, "qwen3_moe", tied=True, dtype=dtype)
    wanted = load_file(tmp_path / "model.safetensors")
    exported = dict(export_hf_weights(load(tmp_path, dtype)))
    assert exported.keys() == wanted.keys() and f"model.layers.1.mlp.experts.{EXPERTS - 1}.up_proj.weight" in wanted
    assert all(exported[name].dtype is dtype and torch.equal(exported[name], wanted[name]) for name in wanted)


def test_a_checkpoint_holds_the_experts(folder: Path, tmp_path: Path) -> None:
    from opd.megatron_backend import checkpoint
    from opd.megatron_backend.hf_bridge import export_hf_weights

    model = load(folder)
    wanted = {name: tensor.clone() for name, tensor in export_hf_weights(model)}
    checkpoint.save(tmp_path, 1, model=model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    checkpoint.load(tmp_path, model=model)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in export_hf_weights(model))


def test_the_balancing_loss_is_its_formula_times_the_share_of_the_batch(folder: Path) -> None:
    """Of the last layer, whose input does not depend on it: with f_e tokens at expert e and mean probability P_e,
    coeff * E * sum_e f_e / (K T) * P_e."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from opd.megatron_backend.moe import share_out_balancing

    coeff, share = 0.3, 0.25
    model = load(folder, aux_loss_coeff=coeff)
    share_out_balancing(model, share)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
    router, inputs = model.decoder.layers[-1].mlp.router, []
    router.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach()))
    (logits_of(model, token_ids()) * 0).sum().backward()

    weight_EH = router.weight.detach().clone().requires_grad_()
    probabilities_TE = (inputs[0][:, 0] @ weight_EH.t()).softmax(-1)
    counts_E = torch.zeros(EXPERTS).index_add_(
        0, probabilities_TE.topk(TOP_K).indices.flatten(), torch.ones(TOP_K * 40)
    )
    loss = coeff * EXPERTS * (counts_E / (TOP_K * 40) * probabilities_TE.mean(0)).sum()
    (share * loss).backward()
    assert weight_EH.grad.abs().max() > 1e-4
    torch.testing.assert_close(router.weight.grad, weight_EH.grad, rtol=1e-4, atol=1e-7)


def test_without_a_weight_there_is_no_balancing_loss(folder: Path) -> None:
    model = load(folder)
    (logits_of(model, token_ids()) * 0).sum().backward()
    assert model.decoder.layers[-1].mlp.router.weight.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"mlp_only_layers": [0]}, r"`mlp_only_layers=\[0\]`"), ({"decoder_sparse_step": 2}, r"`decoder_sparse_step=2`")],
)
def test_models_with_dense_layers_in_between_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    from opd.megatron_backend.hf_bridge import UnsupportedModelError, read_hf_config

    write_tiny_model(tmp_path, "qwen3_moe", tied=True)
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | change))
    with pytest.raises(UnsupportedModelError, match=message):
        read_hf_config(tmp_path)
