"""The block protocol against servers made of two tables: what is asked, how answers end, and what a bad server does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from opd.decoding.draft_length import DraftLength
from opd.errors import EngineError
from opd.sampling.block_length import BlockLength
from opd.sampling.sglang_blocks import SGLangMixture
from opd.serving.http import HttpError, JsonClient
from opd.types import GenerationRequest, GenerationResult, Mixture, SampleStatus, SamplingParams
from tests.unit.sampling.two_servers import STUDENT, TEACHER, VOCABULARY, TwoServers

TOP_K, STOP = 6, 15


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoServers]:
    servers = TwoServers()

    async def post(client: JsonClient, path: str, payload: dict[str, Any], **options: Any) -> Any:
        return await servers.post(client, path, payload, **options)

    monkeypatch.setattr(JsonClient, "post", post)
    yield servers


def write(prompts: list[tuple], params: dict[str, Any] | None = None, **options: Any) -> dict[int, GenerationResult]:
    """Results by request; ``prompts``: the student's, or the student's and the teacher's."""
    requests = [
        GenerationRequest(key=i, prompt_ids=p[0], teacher_prompt_ids=p[1])
        if p and isinstance(p[0], tuple)
        else GenerationRequest(key=i, prompt_ids=p)
        for i, p in enumerate(prompts)
    ]
    engine = SGLangMixture(STUDENT, TEACHER, **{"top_k": TOP_K, "max_context_len": 64, "draft_tokens": 4} | options)
    try:
        sampling = SamplingParams(**{"max_new_tokens": 12, "stop_token_ids": (STOP,)} | (params or {}))
        return {result.key: result for result in engine.generate(requests, sampling, Mixture())}
    finally:
        engine.close()


PROMPTS = [((1, 2, i), (3, i)) for i in range(8)]


def test_answers_do_not_depend_on_the_blocks_or_on_what_is_in_flight(servers: TwoServers) -> None:
    one = write(PROMPTS, draft_tokens=1, concurrency=1)
    assert servers.most_in_flight == 1
    other = write(PROMPTS, draft_tokens=None, concurrency=8)
    assert servers.most_in_flight == 8
    assert {r.status for r in one.values()} == {SampleStatus.COMPLETED, SampleStatus.TRUNCATED}
    for key, result in one.items():
        assert result.response_ids == other[key].response_ids
        assert result.log_probs == pytest.approx(other[key].log_probs)


def test_the_seed_decides_the_verdicts(servers: TwoServers) -> None:
    one, other = write(PROMPTS), write(PROMPTS, {"seed": 1})
    assert [r.response_ids for r in one.values()] != [r.response_ids for r in other.values()]


def test_what_the_servers_are_asked(servers: TwoServers) -> None:
    result = write([((1, 2), (3, 4, 5))], {"temperature": 0.7, "max_new_tokens": 5, "stop_token_ids": ()})[0]
    written = 0
    drafts = [request for address, request in servers.requests if address == STUDENT]
    scores = [request for address, request in servers.requests if address == TEACHER]
    for draft, score in zip(drafts, scores, strict=True):
        count = min(4, 5 - written)
        before = result.response_ids[:written]
        assert draft["input_ids"] == [1, 2, *before]
        asked = draft["sampling_params"]
        assert (asked["max_new_tokens"], asked["temperature"], asked["top_k"]) == (count, 0.7, -1)
        assert asked["ignore_eos"]
        assert score["input_ids"][: 3 + written] == [3, 4, 5, *before]
        assert len(score["input_ids"]) == 3 + written + count
        assert score["logprob_start_len"] == 3 + written - 1
        following = servers.draft(draft)["output_ids"]
        kept = next(
            (i for i, (a, b) in enumerate(zip(following, result.response_ids[written:], strict=False)) if a != b), count
        )
        written += min(kept + 1, count)
    assert written == 5 and result.weight_version == 7


def test_an_answer_ends_at_a_stop_token_or_a_limit(servers: TwoServers) -> None:
    results = write([*PROMPTS, ((1,) * 60, (1,)), ((1,), (1,) * 63), (), ((1,) * 64, (1,))], {"max_new_tokens": 20})
    for i in range(len(PROMPTS)):
        ended = results[i].response_ids[-1] == STOP
        assert STOP not in results[i].response_ids[:-1]
        assert results[i].status is (SampleStatus.COMPLETED if ended else SampleStatus.TRUNCATED)
        assert ended or len(results[i].response_ids) == 20
    assert len(results[8].response_ids) <= 4 and len(results[9].response_ids) == 1  # what the context leaves
    for key, text in ((10, "no tokens"), (11, "64 tokens")):
        assert results[key].status is SampleStatus.ABORTED and text in results[key].error


def nan_teacher(answer: Any) -> None:
    answer["meta_info"]["input_top_logprobs"][1][0][0] = math.nan


def null_student(answer: Any) -> None:
    answer["meta_info"]["output_token_logprobs"][0][0] = None


def short_rows(answer: Any) -> None:
    answer["meta_info"]["output_top_logprobs"].pop()


def other_distribution(answer: Any) -> None:
    for row in answer["meta_info"]["output_top_logprobs"]:
        for entry in row:
            entry[0] /= 2  # as a server would send that reports log-probs at temperature 1


def other_tokens(answer: Any) -> None:
    answer["meta_info"]["input_token_logprobs"][-1][1] += 1


def lost(answer: Any) -> None:
    answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of memory"}


def no_meta(answer: Any) -> None:
    del answer["meta_info"]


def time_out(answer: Any) -> None:
    raise HttpError("timeout", "too slow", retryable=True)


@pytest.mark.parametrize(
    ("address", "fault", "says"),
    [
        (TEACHER, nan_teacher, "teacher's server returned log-probs that are NaN"),
        (STUDENT, null_student, "returned None as a log-prob"),
        (STUDENT, short_rows, "student's server returned no 6 likeliest tokens"),
        (STUDENT, other_distribution, "of another distribution than the draft"),
        (TEACHER, other_tokens, "about other tokens"),
        (STUDENT, lost, "out of memory"),
        (STUDENT, no_meta, "no draft with log-probs"),
        (TEACHER, no_meta, "no score of the draft"),
        (TEACHER, time_out, "teacher's SGLang server at http://teacher could not be used (timeout: too slow)"),
    ],
)
def test_a_bad_answer_of_a_server_ends_one_answer(
    servers: TwoServers, address: str, fault: Callable[[Any], None], says: str
) -> None:
    good = write(PROMPTS, {"stop_token_ids": ()})
    prompt = list(PROMPTS[3][address == TEACHER])

    def spoil(to: str, request: dict[str, Any], answer: Any) -> Any:
        is_third = request["input_ids"][: len(prompt)] == prompt and len(request["input_ids"]) > len(prompt) + 4
        if to == address and is_third:
            fault(answer)
        return answer

    servers.spoil = spoil
    results = write(PROMPTS, {"stop_token_ids": ()})
    bad = results.pop(3)
    assert bad.status is SampleStatus.ABORTED and says in bad.error
    assert 0 < len(bad.response_ids) < 12  # what was written before is kept
    assert bad.response_ids == good[3].response_ids[: len(bad.response_ids)]
    assert len(bad.log_probs) == len(bad.teacher_log_probs) == len(bad.response_ids)
    assert all(result == good[key] for key, result in results.items())


def test_no_server_is_asked_for_tokens_that_it_does_not_have(servers: TwoServers) -> None:
    prompts = [(1, 2), (1, VOCABULARY), ((1,), (2, VOCABULARY + 3))]
    results = write(prompts, top_k=100, vocab_size=VOCABULARY)
    assert {request["top_logprobs_num"] for _, request in servers.requests} == {VOCABULARY}
    assert results[0].error is None and len(results[0].response_ids) > 0
    for key, token in ((1, VOCABULARY), (2, VOCABULARY + 3)):
        assert results[key].status is SampleStatus.ABORTED and f"id {token}" in results[key].error

    servers.requests.clear()
    narrow = write([(1, i) for i in range(4)], vocab_size=8, top_k=4)  # half of what the student may draft
    assert all(max(r["input_ids"]) < 8 for address, r in servers.requests if address == TEACHER)
    assert all(max(result.response_ids, default=0) < 8 for result in narrow.values())
    unlike = [result.error for result in narrow.values() if result.error]
    assert len(unlike) < len(narrow) and all("finds only ids likely that are beyond" in error for error in unlike)


def test_nothing_at_an_address_ends_the_call() -> None:
    engine = SGLangMixture("http://127.0.0.1:9", "http://127.0.0.1:9", max_context_len=64, retries=0)
    requests = [GenerationRequest(key=i, prompt_ids=(1, 2)) for i in range(3)]
    with pytest.raises(EngineError, match="student's SGLang server at http://127.0.0.1:9 could not be used"):
        list(engine.generate(requests, SamplingParams(), Mixture()))
    engine.close()
    engine.close()


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"top_k": 7}, "top_k=7 asks for more likely tokens than the 6"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_ids": 4, "top_k": 3}, "top_ids=4"),
    ],
)
def test_parameters_that_k_tokens_cannot_serve_are_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        write(PROMPTS, params)


def test_a_mixture_that_there_is_not_is_an_error_of_the_call(servers: TwoServers) -> None:
    engine = SGLangMixture(STUDENT, TEACHER, top_k=TOP_K, max_context_len=64)
    request = GenerationRequest(key=0, prompt_ids=(1,))
    with pytest.raises(ValueError, match="fixed_alpha"):
        list(engine.generate([request], SamplingParams(), Mixture(method="fixed")))
    engine.close()


def test_statistics(servers: TwoServers) -> None:
    engine = SGLangMixture(STUDENT, TEACHER, top_k=TOP_K, max_context_len=64, draft_tokens=4)
    requests = [GenerationRequest(key=i, prompt_ids=(i,)) for i in range(6)]
    params = SamplingParams(max_new_tokens=12, top_k=3)
    results = list(engine.generate(requests, params, Mixture()))
    engine.close()
    stats = engine.stats
    assert stats.tokens == sum(len(r.response_ids) for r in results) == 72
    assert stats.rounds == len(servers.requests) // 2
    assert stats.judged == stats.tokens  # each judged draft gives one token, itself or another
    assert stats.drafted >= stats.judged > stats.accepted > 0
    assert 0 < stats.outside < stats.judged - stats.accepted  # three tokens leave out much
    assert stats.seconds > 0


def test_a_block_length_is_kept_for_one_block_of_every_answer() -> None:
    seen: list[tuple[int, int, float]] = []

    class Lengths(DraftLength):
        def observe(self, rows: int, k: int, *, seconds: float, judged: int, accepted: int) -> None:
            seen.append((rows, k, seconds))
            assert (judged, accepted) == (5, 2)
            super().observe(rows, k, seconds=seconds, judged=judged, accepted=accepted)

    length = BlockLength(Lengths())
    with length.answering(), length.answering():
        first = length.choose()
        assert length.choose() == first
        length.observe(first, first, seconds=1.0, judged=3, accepted=2)
        length.observe(first, first - 1, seconds=0.1, judged=2, accepted=0)  # shortened: its time says nothing
        assert seen == [(2, first, 1.0)]
        assert length.choose() != first  # the first trials differ
        length.observe(first, first, seconds=9.0, judged=1, accepted=1)  # of the round before
    assert len(seen) == 1
