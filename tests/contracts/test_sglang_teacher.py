"""The teacher client, slime's function paths and the self-test against a real SGLang server."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd.errors import TeacherError
from opd.rewards import on_policy_distillation
from opd.serving.server import SGLangServer
from opd.teachers.selftest import check_teacher
from opd.teachers.sglang_teacher import SGLangTeacher
from opd.teachers.top_scores import TopRequest
from tests.contracts.conftest import VOCAB_SIZE, TinyModel, make_tokenizer

pytestmark = pytest.mark.contracts


def test_scores_match_transformers_at_every_length(server: SGLangServer, tiny_a: TinyModel, random_ids: Any) -> None:
    cases = [(1, 1), (1, 9), (7, 1), (24, 34), (300, 64), (900, 100)]

    async def score() -> list[tuple[list[int], int, list[float]]]:
        teacher = SGLangTeacher(server.url)
        tokens = [random_ids(prompt + response) for prompt, response in cases]
        scores = await asyncio.gather(*(teacher.score(t, r) for t, (_, r) in zip(tokens, cases, strict=True)))
        await teacher.close()
        return [(t, r, s) for t, (_, r), s in zip(tokens, cases, scores, strict=True)]

    for tokens, response_length, scores in asyncio.run(score()):
        assert scores == pytest.approx(tiny_a.logprobs(tokens)[-response_length:], abs=1e-4)


def test_siblings_reuse_the_prompt_and_get_the_same_scores(
    server: SGLangServer, tiny_a: TinyModel, random_ids: Any
) -> None:
    prompt = random_ids(200)
    group = [prompt + random_ids(16) for _ in range(8)]

    async def score() -> tuple[list[list[float]], Any]:
        teacher = SGLangTeacher(server.url)
        scores = await asyncio.gather(*(teacher.score(tokens, 16) for tokens in group))
        again = await teacher.ask(prompt + random_ids(16), start=len(prompt) - 1)
        await teacher.close()
        return scores, again

    scores, again = asyncio.run(score())
    for tokens, values in zip(group, scores, strict=True):
        assert values == pytest.approx(tiny_a.logprobs(tokens)[-16:], abs=1e-4)
    assert again["meta_info"]["cached_tokens"] >= len(prompt) - 2


def test_a_sequence_longer_than_the_context_gives_a_reason(server: SGLangServer, random_ids: Any) -> None:
    async def score() -> None:
        teacher = SGLangTeacher(server.url)
        try:
            await teacher.score(random_ids(1500), 10)
        finally:
            await teacher.close()

    with pytest.raises(TeacherError, match="http_status.*context"):
        asyncio.run(score())


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
def test_likely_tokens_match_transformers(
    server: SGLangServer, tiny_a: TinyModel, random_ids: Any, support: str
) -> None:
    """In several requests, across prompt lengths, with the last id of the vocabulary among what is asked for."""
    count, cases = 16, [(1, 1), (5, 9), (24, 80)]

    async def score(tokens: list[int], length: int, student_ids: torch.Tensor) -> Any:
        teacher = SGLangTeacher(server.url)
        request = TopRequest(count=count, support=support, vocab_size=VOCAB_SIZE)
        try:
            return await teacher.score_top(tokens, length, request, student_ids)
        finally:
            await teacher.close()

    for prompt, length in cases:
        tokens = [*random_ids(prompt + length - 1), VOCAB_SIZE - 1]
        # Distinct within a row, different from row to row, the first row with the last id of the vocabulary.
        student_TK = (VOCAB_SIZE - 1 - 7 * torch.arange(length)[:, None] - 11 * torch.arange(count)) % VOCAB_SIZE
        logprobs, top = asyncio.run(score(tokens, length, student_TK.int()))
        all_TV = tiny_a.all_logprobs(tokens)[prompt - 1 : -1]
        assert logprobs == pytest.approx(tiny_a.logprobs(tokens)[-length:], abs=1e-4)
        kept_TK = top.ids_TK >= 0
        wanted_TK = all_TV.gather(1, top.ids_TK.clamp(min=0))
        assert float(((wanted_TK - top.logprobs_TK) * kept_TK).abs().max()) < 1e-4
        best_TK = all_TV.topk(count).indices
        if support == "teacher":
            assert top.ids_TK.tolist() == best_TK.tolist()
        elif support == "student":
            assert top.ids_TK.tolist() == student_TK.tolist()
        else:
            for row, best, mine in zip(top.ids_TK.tolist(), best_TK.tolist(), student_TK.tolist(), strict=True):
                kept = [i for i in row if i >= 0]
                assert len(kept) == len(set(kept))
                assert set(kept) == {*best, *mine}


def test_function_paths_on_slime_shaped_samples(server: SGLangServer, tiny_a: TinyModel, random_ids: Any) -> None:
    args = SimpleNamespace(rm_url=f"{server.url}/generate")
    samples = [
        SimpleNamespace(tokens=random_ids(20), response_length=n, reward=None, label="x", response="", metadata={})
        for n in (8, 0, 3)
    ]

    async def task_reward(args: Any, sample: Any) -> float:
        return float(sample.response_length)

    async def reward_all() -> list[dict[str, Any]]:
        calls = (on_policy_distillation.reward_func(args, s, task_reward=task_reward) for s in samples)
        return list(await asyncio.gather(*calls))

    for sample, reward in zip(samples, asyncio.run(reward_all()), strict=True):
        sample.reward = reward
    assert on_policy_distillation.post_process_rewards(args, samples) == ([8.0, 0.0, 3.0], [8.0, 0.0, 3.0])
    for sample in samples:
        expected = tiny_a.logprobs(sample.tokens)[len(sample.tokens) - 1 - sample.response_length :]
        assert sample.teacher_log_probs.tolist() == pytest.approx(expected, abs=1e-4)


def test_self_test_accepts_the_student_itself(server: SGLangServer, tiny_a: TinyModel) -> None:
    asyncio.run(check_teacher(f"{server.url}/generate", tiny_a.tokenizer, student_folder=tiny_a.folder))


def test_self_test_refuses_another_tokenizer(server: SGLangServer) -> None:
    with pytest.raises(TeacherError, match=r"`--rm-url=.*other token ids.*same tokenizer"):
        asyncio.run(check_teacher(server.url, make_tokenizer(reverse=True)))


def test_self_test_refuses_a_smaller_vocabulary(server: SGLangServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"beyond": 512})
    with pytest.raises(TeacherError, match=r"refuses token id 512.*at least as large"):
        asyncio.run(check_teacher(server.url, tokenizer))


def test_input_logprobs_do_not_depend_on_the_requests_temperature(server: SGLangServer, random_ids: Any) -> None:
    tokens = random_ids(40)

    async def ask(temperature: float) -> list[Any]:
        teacher = SGLangTeacher(server.url)
        answer = await teacher.ask(tokens, start=0, temperature=temperature)
        await teacher.close()
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]

    cold, hot = asyncio.run(ask(0.5)), asyncio.run(ask(2.0))
    assert cold == pytest.approx(hot, abs=1e-5)
    assert all(math.isfinite(value) for value in cold)
