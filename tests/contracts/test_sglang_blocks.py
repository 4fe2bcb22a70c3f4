"""The mixture over two real SGLang servers: the frequencies of answers, what is reported of them, and how they end."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from opd.sampling.sglang_blocks import SGLangMixture
from opd.serving.command import ServerOptions
from opd.serving.server import SGLangServer
from opd.types import GenerationRequest, GenerationResult, Mixture, SampleStatus, SamplingParams
from tests.contracts.conftest import CONTEXT, START_SECONDS, TinyModel
from tests.unit.sampling.sparse_enumeration import CONTROLS, chi_square, looks_uniform, sparse_q

pytestmark = pytest.mark.contracts

TOP_K, TEMPERATURE = 6, 0.4  # the student's 6 likeliest hold .8 of its mass
SEEDS = range(12)
COUNT = 100  # answers per seed
DRAFT_LENGTHS = (2, 1, None)
Prompts = tuple[tuple[int, ...], tuple[int, ...]]  # the student's and the teacher's


@pytest.fixture(scope="session")
def near_a(tiny_a: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A teacher that is likely to say what the student says: the same weights, disturbed."""
    folder = tmp_path_factory.mktemp("near_a")
    model = copy.deepcopy(tiny_a.model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    model.save_pretrained(folder)
    tiny_a.tokenizer.save_pretrained(folder)
    return TinyModel(folder, model, tiny_a.tokenizer)


@pytest.fixture(scope="session")
def teacher_server(
    near_a: TinyModel, starting_servers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SGLangServer]:
    """Started beside the servers of the whole tier."""
    options = ServerOptions(model_path=str(near_a.folder), context_length=CONTEXT, max_running_requests=128)
    with SGLangServer(options, log_path=tmp_path_factory.mktemp("logs") / "teacher.log") as teacher:
        teacher.wait_ready(START_SECONDS)
        yield teacher


@pytest.fixture(scope="module")
def make_engine(server: SGLangServer, teacher_server: SGLangServer) -> Iterator[Any]:
    engines = []

    def make(**changes: Any) -> SGLangMixture:
        options = {"top_k": TOP_K, "draft_tokens": 2, "max_context_len": CONTEXT, "retries": 0} | changes
        engines.append(SGLangMixture(server.url, teacher_server.url, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def enumerated(tiny_a: TinyModel, near_a: TinyModel) -> list[tuple[Prompts, dict[tuple[int, int], float]]]:
    """For each seed two prompts and the probability of every answer of two tokens. Of many prompts, those where a
    wrong judgement shows most."""

    @cache
    def q_after(prompts: Prompts, answer: tuple[int, ...]) -> torch.Tensor:
        rows = [
            model.all_logprobs([*prompt, *answer], TEMPERATURE)[-1]
            for model, prompt in zip((tiny_a, near_a), prompts, strict=True)
        ]
        return sparse_q(*rows, TOP_K)

    def power(prompts: Prompts) -> float:
        """Expected chi-square per answer, of its first token, when rejected drafts are replaced from q."""
        q = q_after(prompts, ())
        kept = torch.minimum(q, tiny_a.all_logprobs(list(prompts[0]), TEMPERATURE)[-1].exp())
        excess = (kept + (1 - kept.sum()) * q - q)[q > 0]
        return float((excess**2 / q[q > 0]).sum())

    generator = torch.Generator().manual_seed(11)
    candidates = []
    for _ in range(60):
        ids = torch.randint(3, tiny_a.model.config.vocab_size, (7,), generator=generator).tolist()
        candidates.append((tuple(ids[1:]), tuple(ids)))  # the teacher reads one token more
    candidates.sort(key=power, reverse=True)
    tables = []
    for prompts in candidates[: len(SEEDS)]:
        first = q_after(prompts, ())
        table = {
            (i, j): float(first[i] * second[j])
            for i in first.nonzero()[:, 0].tolist()
            for second in [q_after(prompts, (i,))]
            for j in second.nonzero()[:, 0].tolist()
        }
        tables.append((prompts, table))
    return tables


def requests_of(prompts: Prompts, count: int) -> list[GenerationRequest]:
    return [GenerationRequest(key=i, prompt_ids=prompts[0], teacher_prompt_ids=prompts[1]) for i in range(count)]


def sampling(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": TEMPERATURE, "max_new_tokens": 2} | changes)


def p_value(results: list[GenerationResult], table: dict[tuple[int, int], float]) -> float:
    place = {answer: i for i, answer in enumerate(table)}
    found = [place.get(tuple(result.response_ids), len(place)) for result in results]  # the last: q has no such answer
    return chi_square(
        torch.tensor(found).bincount(minlength=len(place) + 1),
        torch.tensor([*table.values(), 0.0], dtype=torch.float64),
    )


def test_the_frequencies_are_those_of_the_enumerated_mixture(make_engine: Any, enumerated: Any) -> None:
    found = []
    for seed, (prompts, table) in zip(SEEDS, enumerated, strict=True):
        engine = make_engine(draft_tokens=DRAFT_LENGTHS[seed % len(DRAFT_LENGTHS)])
        results = list(engine.generate(requests_of(prompts, COUNT), sampling(seed=seed), Mixture()))
        assert sum(table.values()) == pytest.approx(1)
        found.append(p_value(results, table))
    assert looks_uniform(found), found


@pytest.mark.parametrize("control", CONTROLS)
def test_a_wrong_judgement_is_found_out(make_engine: Any, enumerated: Any, control: str) -> None:
    found = []
    with CONTROLS[control]():
        for seed, (prompts, table) in zip(SEEDS[:2], enumerated, strict=False):
            results = list(make_engine().generate(requests_of(prompts, 2 * COUNT), sampling(seed=seed), Mixture()))
            found.append(p_value(results, table))
    assert max(found) < 1e-3 and not looks_uniform(found)


def test_reported_log_probs_are_those_of_both_models(
    make_engine: Any, tiny_a: TinyModel, near_a: TinyModel, random_ids: Any
) -> None:
    prompts = (tuple(random_ids(9)), tuple(random_ids(14)))
    engine = make_engine(top_k=64, draft_tokens=5)
    params = SamplingParams(temperature=1.0, max_new_tokens=24, top_ids=3)
    (result,) = engine.generate(requests_of(prompts, 1), params, Mixture())
    assert len(result.response_ids) == 24 and engine.stats.alone == 0
    for model, prompt, reported in (
        (tiny_a, prompts[0], result.student_log_probs),
        (near_a, prompts[1], result.teacher_log_probs),
    ):
        expected = model.logprobs([*prompt, *result.response_ids])[len(prompt) - 1 :]
        assert reported == pytest.approx(expected, abs=1e-4)
    after_prompt = tiny_a.all_logprobs(list(prompts[0]))[-1]
    assert result.top_ids[0].equal(after_prompt.topk(3).indices.int())
    rows = [m.all_logprobs(list(p))[-1] for m, p in ((tiny_a, prompts[0]), (near_a, prompts[1]))]
    q = sparse_q(*rows, 64)
    assert result.log_probs[0] == pytest.approx(float(q[result.response_ids[0]].log()), abs=1e-4)


def test_how_answers_end(make_engine: Any, random_ids: Any) -> None:
    prompts = [tuple(random_ids(n)) for n in (5, 5, 40, 5)]
    requests = [
        GenerationRequest(key=i, prompt_ids=p, teacher_prompt_ids=t)
        for i, (p, t) in enumerate([(prompts[0], None), ((), None), (prompts[2], None), (prompts[3], prompts[2])])
    ]
    engine = make_engine(draft_tokens=3, max_context_len=40, teacher_max_context_len=44)
    stop = tuple(range(0, 512, 7))
    results = {r.key: r for r in engine.generate(requests, sampling(max_new_tokens=30, temperature=1.0), Mixture())}
    assert results[0].status is SampleStatus.TRUNCATED and len(results[0].response_ids) == 30
    assert results[1].status is SampleStatus.ABORTED and "no tokens" in results[1].error
    assert results[2].status is SampleStatus.ABORTED and "40 tokens" in results[2].error
    assert len(results[3].response_ids) == 4  # what the teacher's context leaves
    many = requests_of((prompts[0], prompts[0]), 16)
    params = sampling(max_new_tokens=30, temperature=1.0, stop_token_ids=stop)
    for result in engine.generate(many, params, Mixture()):
        stops = [token in stop for token in result.response_ids]
        assert not any(stops[:-1])
        assert result.status is (SampleStatus.COMPLETED if stops[-1] else SampleStatus.TRUNCATED)
        assert len(result.log_probs) == len(result.alphas) == len(result.response_ids)


def test_one_bad_request_does_not_stop_the_others(make_engine: Any, random_ids: Any) -> None:
    good, long = tuple(random_ids(6)), tuple(random_ids(CONTEXT + 50))
    requests = [GenerationRequest(key=i, prompt_ids=p) for i, p in enumerate([good, long, good])]
    engine = make_engine(max_context_len=2 * CONTEXT)  # more than the server was started with
    results = {r.key: r for r in engine.generate(requests, sampling(max_new_tokens=6), Mixture())}
    assert results[1].status is SampleStatus.ABORTED
    assert "student's SGLang server" in results[1].error and "400" in results[1].error
    assert [len(results[i].response_ids) for i in (0, 2)] == [6, 6]
