"""Speculative KD against its distribution, enumerated on a small vocabulary."""

import math
from itertools import product

import pytest
import torch

from opd.rollout.speculative_kd import SpeculativeKDEngine, draw_tokens
from opd.rollout.torch_engine import TorchEngine
from opd.torchvision_ops import define_missing_ops
from opd.types import GenerationRequest, SamplingParams

define_missing_ops()
import transformers  # noqa: E402

VOCABULARY = 6
EOS = 1


def make_model(seed: int, **changes) -> torch.nn.Module:
    shape = dict(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.5, max_position_embeddings=64,
    ) | changes  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)).eval()


STUDENT, TEACHER = make_model(0), make_model(1, hidden_size=24, num_hidden_layers=2)
TEMPERATURE = 0.8


def make_engine(top_k: int, rows: int = 4000) -> SpeculativeKDEngine:
    student = TorchEngine(STUDENT, max_running_requests=rows, max_context_len=40)
    return SpeculativeKDEngine(student, TEACHER, top_k=top_k)


def requests(prompts, count: int) -> list[GenerationRequest]:
    return [GenerationRequest(key=1000 * g + i, prompt_ids=p) for g, p in enumerate(prompts) for i in range(count)]


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": TEMPERATURE, "max_new_tokens": 2, "seed": 3} | changes)


def exact_q(prefix: tuple[int, ...], top_k: int) -> list[float]:
    """Of the next token, from the definition with Python numbers."""
    ids = torch.tensor([prefix])
    with torch.no_grad():
        student, teacher = (
            (m(ids).logits[0, -1].double() / TEMPERATURE).softmax(-1).tolist() for m in (STUDENT, TEACHER)
        )
    likely = sorted(range(VOCABULARY), key=lambda a: -teacher[a])[:top_k]
    rejected = 1 - sum(student[a] for a in likely)
    return [(student[a] if a in likely else 0.0) + rejected * teacher[a] for a in range(VOCABULARY)]


def exact_pairs(prompt: tuple[int, ...], top_k: int) -> dict[tuple[int, int], float]:
    """Probability of every answer of two tokens."""
    first = exact_q(prompt, top_k)
    second = {a: exact_q((*prompt, a), top_k) for a in range(VOCABULARY)}
    return {(a, b): first[a] * second[a][b] for a, b in product(range(VOCABULARY), repeat=2)}


def chi_square(counts: dict[tuple[int, int], int], expected: dict[tuple[int, int], float]) -> float:
    """In standard deviations above its mean, over the cells with at least 5 expected answers."""
    total = sum(counts.values())
    cells = [pair for pair, p in expected.items() if p * total >= 5]
    value = sum((counts.get(pair, 0) - expected[pair] * total) ** 2 / (expected[pair] * total) for pair in cells)
    return (value - len(cells)) / math.sqrt(2 * len(cells))


def sampled_pairs(top_k: int, count: int = 4000) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for result in make_engine(top_k).generate(requests([(2, 3)], count), params()):
        pair = tuple(result.response_ids)
        counts[pair] = counts.get(pair, 0) + 1
    return counts


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_answers_of_two_tokens_have_the_exact_distribution(top_k):
    counts = sampled_pairs(top_k)
    assert chi_square(counts, exact_pairs((2, 3), top_k)) < 4
    assert chi_square(counts, exact_pairs((2, 3), VOCABULARY)) > 20  # the student's own distribution must fail
    assert chi_square(counts, exact_pairs((2, 3), top_k % 4 + 1)) > 4  # and that of another K


@pytest.mark.parametrize("top_k", [1, 3, VOCABULARY])
def test_log_probs_are_log_q(top_k):
    prompts = [(2, 3), (5,), (4, 2, 0, 3)]
    asked = {r.key: r for r in requests(prompts, 6)}
    for result in make_engine(top_k, rows=5).generate(list(asked.values()), params(max_new_tokens=8)):
        prefix = asked[result.key].prompt_ids
        for token, logprob in zip(result.response_ids, result.log_probs, strict=True):
            assert logprob == pytest.approx(math.log(exact_q(prefix, top_k)[token]), abs=1e-5)
            prefix = (*prefix, token)


def test_with_the_whole_vocabulary_the_student_writes_alone():
    engine, asked = make_engine(VOCABULARY), requests([(2, 3), (5, 4, 3)], 8)
    settings = params(max_new_tokens=12, stop_token_ids=(EOS,))
    alone = {r.key: r for r in engine.student.generate(asked, settings)}
    for result in engine.generate(asked, settings):
        assert result.response_ids == alone[result.key].response_ids
        assert result.log_probs == pytest.approx(alone[result.key].log_probs, abs=1e-6)
    assert engine.take_stats() == {"replaced_share": 0.0}


def test_a_teacher_that_is_the_student_replaces_its_unlikely_tokens():
    student = TorchEngine(STUDENT, max_running_requests=500, max_context_len=40)
    engine = SpeculativeKDEngine(student, make_model(0), top_k=2)
    first = [r.response_ids[0] for r in engine.generate(requests([(2, 3)], 500), params(max_new_tokens=1))]
    with torch.no_grad():
        own = (STUDENT(torch.tensor([[2, 3]])).logits[0, -1] / TEMPERATURE).softmax(-1)
    outside = 1 - float(own.topk(2).values.sum())
    assert engine.take_stats()["replaced_share"] == pytest.approx(outside, abs=4 * math.sqrt(0.25 / 500))
    assert engine.take_stats() == {}
    assert len(set(first)) > 2  # a replacement is drawn from the teacher's whole distribution


def test_an_answer_does_not_depend_on_the_batch_around_it():
    asked = requests([(2, 3), (5, 4, 3, 2, 0), (4,)], 5)
    settings = params(max_new_tokens=15, stop_token_ids=(EOS,))
    together = {r.key: r.response_ids for r in make_engine(2, rows=15).generate(asked, settings)}
    in_turn = {r.key: r.response_ids for r in make_engine(2, rows=2).generate(asked[::-1], settings)}
    assert together == in_turn
    assert len({tuple(ids) for ids in together.values()}) > 8


def test_weights_go_to_the_student_alone():
    engine = make_engine(2)
    student, teacher = make_model(0), make_model(1)
    engine = SpeculativeKDEngine(TorchEngine(student, max_running_requests=4, max_context_len=40), teacher, top_k=2)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    engine.set_weights(make_model(7).named_parameters(), version=5)
    assert torch.equal(student.model.norm.weight, make_model(7).model.norm.weight)
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert {r.weight_version for r in engine.generate(requests([(2,)], 2), params())} == {5}
    assert {r.weight_version for r in engine.student.generate(requests([(2,)], 2), params(temperature=0))} == {5}


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}])
def test_what_would_change_the_distribution_is_refused(changes):
    with pytest.raises(ValueError, match="whole distributions at a temperature above 0"):
        list(make_engine(2).generate(requests([(2,)], 1), params(**changes)))


def test_a_certain_teacher_is_obeyed():
    student_RV = torch.zeros(64, VOCABULARY)
    teacher_RV = torch.full((64, VOCABULARY), -50.0)
    teacher_RV[:, 4] = 50.0
    uniforms_R2 = torch.rand(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids_R, logprobs_R, replaced_R = draw_tokens(student_RV, teacher_RV, uniforms_R2, params(), top_k=1)
    assert ids_R.tolist() == [4] * 64
    torch.testing.assert_close(logprobs_R, torch.zeros(64), atol=1e-6, rtol=0)
    assert 0 < int((~replaced_R).sum()) < 64  # proposals of 4 were kept, and count as the student's
