"""The embedded engine against transformers' own generate and forward, for each model family."""

import random

import pytest
import torch

from opd.errors import WeightSyncError
from opd.rollout.torch_engine import TorchEngine
from opd.torchvision_ops import define_missing_ops
from opd.types import GenerationRequest, SampleStatus, SamplingParams

define_missing_ops()
import transformers  # noqa: E402

EOS = 1
SHAPE = dict(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, initializer_range=0.2, max_position_embeddings=128,
)  # fmt: skip


def make_model(family: str = "Qwen3", **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def make_requests(samples_per_prompt: int = 4) -> list[GenerationRequest]:
    random.seed(0)
    prompts = [tuple(random.randrange(2, 50) for _ in range(n)) for n in (3, 9, 5, 24)]
    return [
        GenerationRequest(key=10 * g + i, prompt_ids=prompt)
        for g, prompt in enumerate(prompts)
        for i in range(samples_per_prompt)
    ]


def generate(engine: TorchEngine, requests, **params):
    results = list(engine.generate(requests, SamplingParams(stop_token_ids=(EOS,), **params)))
    assert sorted(r.key for r in results) == sorted(r.key for r in requests)
    return {r.key: r for r in results}


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
def test_greedy_equals_transformers(family):
    model = make_model(family)
    results = generate(
        TorchEngine(model, max_running_requests=3, max_context_len=100),
        make_requests(1),
        temperature=0,
        max_new_tokens=12,
    )
    for request in make_requests(1):
        prompt = torch.tensor([request.prompt_ids])
        want = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=0)
        assert results[request.key].response_ids == want[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_behaviour_logprobs_equal_a_full_forward(family):
    model = make_model(family)
    engine = TorchEngine(model, max_running_requests=5, max_context_len=100)
    requests = {r.key: r for r in make_requests()}
    for key, result in generate(engine, list(requests.values()), temperature=0.8, max_new_tokens=30).items():
        n = len(result.response_ids)
        ids = torch.tensor([[*requests[key].prompt_ids, *result.response_ids]])
        logits = model(ids).logits[0, -n - 1 : -1].detach()
        want = (logits / 0.8).log_softmax(-1).gather(1, ids[0, -n:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.log_probs), want, atol=1e-4, rtol=0)
        ended = result.response_ids[-1] == EOS
        assert result.status is (SampleStatus.COMPLETED if ended else SampleStatus.TRUNCATED)
        assert EOS not in result.response_ids[:-1]


def test_an_answer_does_not_depend_on_the_batch_around_it():
    model = make_model()
    requests = make_requests()
    together = generate(TorchEngine(model, max_running_requests=16, max_context_len=100), requests, max_new_tokens=30)
    in_turn = generate(
        TorchEngine(model, max_running_requests=3, max_context_len=100), requests[::-1], max_new_tokens=30
    )
    assert {k: r.response_ids for k, r in together.items()} == {k: r.response_ids for k, r in in_turn.items()}
    assert len({tuple(r.response_ids) for r in together.values()}) > 8  # siblings differ


def test_the_likeliest_ids_come_along_when_asked_for():
    model = make_model()
    requests = {r.key: r for r in make_requests(2)}
    engine = TorchEngine(model, max_running_requests=3, max_context_len=100)
    for key, result in generate(engine, list(requests.values()), max_new_tokens=6, top_ids=4).items():
        n = len(result.response_ids)
        ids = torch.tensor([[*requests[key].prompt_ids, *result.response_ids]])
        want = model(ids).logits[0, -n - 1 : -1].topk(4).indices
        assert result.top_ids.equal(want.int())


def test_the_context_limit_shortens_answers_and_refuses_prompts():
    engine = TorchEngine(make_model(), max_running_requests=4, max_context_len=26)
    lengths = {len(r.response_ids) for r in engine.generate(make_requests(1), SamplingParams(max_new_tokens=30))}
    assert lengths == {23, 17, 21, 2}
    engine.max_context_len = 24
    with pytest.raises(ValueError, match="a prompt of 24 tokens leaves no room"):
        list(engine.generate(make_requests(1), SamplingParams(max_new_tokens=30)))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_taken_whole_and_verified(tied):
    engine = TorchEngine(make_model(tie_word_embeddings=tied), max_running_requests=4, max_context_len=64)
    torch.manual_seed(1)
    other = make_model(tie_word_embeddings=tied)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    tokens = list(range(2, 30))
    expected = (
        other(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    )
    with pytest.raises(WeightSyncError, match="nats per token, more than --max-logprob-mismatch"):
        engine.verify(tokens, expected.tolist(), tolerance=1e-3)
    engine.set_weights(other.named_parameters(), version=7)
    assert engine.verify(tokens, expected.tolist(), tolerance=1e-3) < 1e-5
    assert {r.weight_version for r in engine.generate(make_requests(1), SamplingParams(max_new_tokens=2))} == {7}


def test_partial_or_foreign_weights_are_refused():
    engine = TorchEngine(make_model(), max_running_requests=4, max_context_len=64)
    weights = list(make_model().named_parameters())
    with pytest.raises(WeightSyncError, match="got no weights, the first is"):
        engine.set_weights(weights[1:], version=1)
    with pytest.raises(WeightSyncError, match="has no tensor `nonsense`"):
        engine.set_weights([("nonsense", torch.zeros(1))], version=1)
    with pytest.raises(WeightSyncError, match="is \\(1,\\)"):
        engine.set_weights([(weights[0][0], torch.zeros(1))], version=1)
