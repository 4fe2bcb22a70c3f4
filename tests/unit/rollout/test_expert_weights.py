"""A mixture of experts in the embedded engine: weights by the names of a checkpoint, answers as transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.errors import WeightSyncError
from opd.rollout.torch_engine import TorchEngine
from opd.types import GenerationRequest, SamplingParams
from tests.tiny_models import write_tiny_model

PROMPT = (3, 77, 142, 9, 20)


@pytest.fixture
def given(tmp_path: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor], TorchEngine]:
    """A model, its weights as its checkpoint names them, and an engine with other ones."""
    model = write_tiny_model(tmp_path, "qwen3_moe", tied=False)
    other = type(model)(model.config)
    engine = TorchEngine(other, max_running_requests=4, max_context_len=100)
    return model, load_file(tmp_path / "model.safetensors"), engine


def test_answers_come_from_the_weights_that_were_given(given) -> None:
    model, weights, engine = given
    engine.set_weights(weights.items(), version=1)
    requests = [GenerationRequest(key=k, prompt_ids=PROMPT[k:]) for k in range(3)]
    for result in engine.generate(requests, SamplingParams(temperature=0, max_new_tokens=10)):
        prompt = torch.tensor([PROMPT[result.key :]])
        want = model.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert result.response_ids == want[0, prompt.shape[1] :].tolist()


def test_an_expert_that_was_left_out_is_named(given) -> None:
    _, weights, engine = given
    left_out = weights.pop("model.layers.1.mlp.experts.2.up_proj.weight")
    with pytest.raises(
        WeightSyncError, match=r"1 tensors .* first is `model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight`"
    ):
        engine.set_weights(weights.items(), version=1)
    with pytest.raises(WeightSyncError, match=r"no tensor `model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight`"):
        engine.set_weights([("model.layers.1.mlp.experts.4.up_proj.weight", left_out)], version=1)
