"""Megatron models built from Hugging Face folders compute the same and give the same weights back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny_models import FAMILIES, LLAMA3_ROPE, VOCAB_SIZE, write_tiny_model

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]


def load(folder: Path, dtype: torch.dtype = torch.float32, **options):
    from opd.megatron_backend import hf_bridge
    from opd.megatron_backend.groups import ParallelSizes

    model = hf_bridge.build_model(hf_bridge.read_hf_config(folder), ParallelSizes(), dtype=dtype, **options)
    hf_bridge.load_hf_weights(model, folder)
    return model.eval()


def token_ids(rows: int = 2, length: int = 60) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(3))


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_transformers_and_weights_come_back(tmp_path: Path, family: str, tied: bool) -> None:
    from opd.megatron_backend.hf_bridge import export_hf_weights

    reference = write_tiny_model(tmp_path, family, tied=tied)
    model = load(tmp_path)
    with torch.no_grad():
        expected = reference(token_ids()).logits
    torch.testing.assert_close(logits_of(model, token_ids()), expected, rtol=0, atol=1e-4)
    exported = dict(export_hf_weights(model))
    wanted = reference.state_dict()
    if tied:
        wanted.pop("lm_head.weight")
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)


def test_a_packed_row_is_its_sequences_one_by_one(tmp_path: Path) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    write_tiny_model(tmp_path, "qwen3", tied=True)
    model = load(tmp_path)
    lengths, tokens = [20, 7, 15], token_ids(3, 20)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=20, max_seqlen_kv=20
    )
    row = torch.cat([tokens[i, :n] for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        got = model(row, positions, None, packed_seq_params=packed)
    for i, part in enumerate(got[0].split(lengths)):
        alone = logits_of(model, tokens[i : i + 1, : lengths[i]])[0]
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-5)


def test_llama_3_rope_scaling_uses_the_models_own_constants(tmp_path: Path) -> None:
    reference = write_tiny_model(tmp_path, "llama", tied=False, rope=LLAMA3_ROPE)
    tokens = token_ids(1, 200)  # far beyond the 32 original positions
    with torch.no_grad():
        expected = reference(tokens).logits
    torch.testing.assert_close(logits_of(load(tmp_path), tokens), expected, rtol=0, atol=1e-4)


def test_a_tied_model_leaves_a_later_untied_one_alone(tmp_path: Path) -> None:
    from opd.megatron_backend.hf_bridge import export_hf_weights

    write_tiny_model(tmp_path / "tied", "qwen2", tied=True)
    untied = write_tiny_model(tmp_path / "untied", "qwen3", tied=False)
    tied_model, model = load(tmp_path / "tied"), load(tmp_path / "untied")
    assert "lm_head.weight" not in dict(export_hf_weights(tied_model))
    assert torch.equal(dict(export_hf_weights(model))["lm_head.weight"], untied.state_dict()["lm_head.weight"])


def test_padded_vocabulary_changes_neither_softmax_nor_export_nor_gradient(tmp_path: Path) -> None:
    from opd.megatron_backend.hf_bridge import export_hf_weights

    reference = write_tiny_model(tmp_path, "qwen2", tied=True)
    plain, padded = load(tmp_path), load(tmp_path, make_vocab_size_divisible_by=64)
    tokens = token_ids()
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    logprobs = []
    for model in (plain, padded):
        logprobs.append(model(tokens, positions, None).log_softmax(-1))
        logprobs[-1][..., 5].sum().backward()
    assert logprobs[1].size(-1) == 256
    torch.testing.assert_close(logprobs[1][..., :VOCAB_SIZE], logprobs[0], rtol=0, atol=1e-6)
    assert logprobs[1][..., VOCAB_SIZE:].exp().sum() == 0
    grads = [m.embedding.word_embeddings.weight.grad for m in (plain, padded)]
    torch.testing.assert_close(grads[1][:VOCAB_SIZE], grads[0], rtol=0, atol=1e-5)
    assert grads[1][VOCAB_SIZE:].abs().sum() == 0
    exported = dict(export_hf_weights(padded))["model.embed_tokens.weight"]
    assert torch.equal(exported, reference.state_dict()["model.embed_tokens.weight"])


def test_bfloat16_weights_keep_dtype_and_bits(tmp_path: Path) -> None:
    from opd.megatron_backend.hf_bridge import export_hf_weights, hf_weights_dtype

    reference = write_tiny_model(tmp_path, "qwen3", tied=False, dtype=torch.bfloat16)
    assert hf_weights_dtype(tmp_path) is torch.bfloat16
    wanted = reference.state_dict()
    for name, tensor in export_hf_weights(load(tmp_path, torch.bfloat16)):
        assert tensor.dtype is torch.bfloat16 and torch.equal(tensor, wanted[name])


def test_random_init_is_random_and_finite(tmp_path: Path) -> None:
    from opd.megatron_backend import hf_bridge
    from opd.megatron_backend.groups import ParallelSizes

    write_tiny_model(tmp_path, "qwen3", tied=False)
    config = hf_bridge.read_hf_config(tmp_path)
    model = hf_bridge.build_model(config, ParallelSizes(), dtype=torch.float32, random_init=True)
    deviation = model.decoder.layers[0].mlp.linear_fc1.weight.std().item()
    assert deviation == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"model type `gpt2` is not supported; supported: llama, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, r"RoPE type `yarn`"),
        ({"hidden_act": "gelu"}, r"`hidden_act=gelu`"),
        ({"use_sliding_window": True}, r"`use_sliding_window=True`"),
        ({"attention_bias": True}, r"`attention_bias=True`"),
    ],
)
def test_models_that_would_compute_something_else_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    from opd.megatron_backend.hf_bridge import UnsupportedModelError, read_hf_config

    write_tiny_model(tmp_path, "qwen3", tied=True)
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | change))
    with pytest.raises(UnsupportedModelError, match=message):
        read_hf_config(tmp_path)


def test_folders_without_config_or_weights_are_refused(tmp_path: Path) -> None:
    from opd.megatron_backend.hf_bridge import UnsupportedModelError, load_hf_weights, read_hf_config

    with pytest.raises(FileNotFoundError, match="no config.json"):
        read_hf_config(tmp_path)
    write_tiny_model(tmp_path, "qwen3", tied=True)
    model = load(tmp_path)
    write_tiny_model(tmp_path / "shallow", "qwen3", tied=True, num_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"are not those of its config.json.*layers\.1\."):
        load_hf_weights(model, tmp_path / "shallow")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_hf_weights(model, tmp_path)
