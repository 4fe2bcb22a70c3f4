"""Scores asked for together against scores asked for one by one, on a real SGLang server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from opd.serving.http import JsonClient
from opd.serving.server import SGLangServer
from opd.teachers.score_batches import BatchLimits, ScoreBatcher
from opd.teachers.sglang_teacher import SGLangTeacher
from opd.teachers.top_scores import TopRequest
from tests.contracts.conftest import VOCAB_SIZE

pytestmark = pytest.mark.contracts


def test_rows_scored_together_get_what_they_get_alone(server: SGLangServer, random_ids: Any) -> None:
    """Two prompts, responses of unequal lengths, plain and with likely tokens; one request behind the leaders."""
    prompts = [random_ids(150), random_ids(9)]
    samples = [(prompt + random_ids(length), length) for prompt in prompts for length in (1, 40, 17)]
    top = TopRequest(count=8, vocab_size=VOCAB_SIZE)

    async def score(batches: BatchLimits) -> tuple[list[Any], list[Any], int]:
        teacher = SGLangTeacher(server.url, batches=batches)
        plain = await asyncio.gather(*(teacher.score(tokens, length) for tokens, length in samples))
        requests = teacher.stats.take().requests
        likely = await asyncio.gather(*(teacher.score_top(tokens, length, top) for tokens, length in samples))
        await teacher.close()
        return plain, likely, requests

    alone, alone_top, alone_requests = asyncio.run(score(BatchLimits(rows=1)))
    together, together_top, requests = asyncio.run(score(BatchLimits()))
    assert (alone_requests, requests) == (6, 2)
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, abs=1e-5)
    for (one, one_top), (other, other_top) in zip(alone_top, together_top, strict=True):
        assert other == pytest.approx(one, abs=1e-5)
        assert other_top.ids_TK.tolist() == one_top.ids_TK.tolist()
        assert (other_top.logprobs_TK - one_top.logprobs_TK).abs().max() < 1e-5


def test_a_row_that_the_server_refuses_costs_its_neighbours_nothing(server: SGLangServer, random_ids: Any) -> None:
    async def score() -> list[Any]:
        teacher = SGLangTeacher(server.url)
        prompts = [random_ids(n) for n in (20, 1500, 30)]  # the second is beyond the context
        try:
            return await asyncio.gather(
                *(teacher.score(prompt + random_ids(5), 5) for prompt in prompts), return_exceptions=True
            )
        finally:
            await teacher.close()

    first, refused, last = asyncio.run(score())
    assert (len(first), len(last)) == (5, 5)
    assert "context" in str(refused)


def test_lists_of_ids_to_look_up_share_a_request(server: SGLangServer, random_ids: Any) -> None:
    wanted = [[5, 9], [300, 7, 11]]
    payloads = [
        {
            "input_ids": random_ids(12),
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": start,
            "token_ids_logprob": ids,
        }
        for start, ids in zip((3, 8), wanted, strict=True)
    ]

    async def ask() -> tuple[list[Any], list[Any], int]:
        client = JsonClient(server.url)
        batcher = ScoreBatcher(client.post_once)
        together = await asyncio.gather(*(batcher.post("/generate", p) for p in payloads))
        requests = client.stats.requests
        alone = [await client.post("/generate", p) for p in payloads]
        await client.close()
        return together, alone, requests

    together, alone, requests = asyncio.run(ask())
    assert requests == 1
    for ids, one, other in zip(wanted, alone, together, strict=True):
        rows, expected = (answer["meta_info"]["input_token_ids_logprobs"][1:] for answer in (other, one))
        assert [[entry[1] for entry in row] for row in rows] == [ids] * len(expected)
        for row, should in zip(rows, expected, strict=True):
            assert [entry[0] for entry in row] == pytest.approx([entry[0] for entry in should], abs=1e-5)


def test_the_cpu_server_imports_neither_megatron_nor_the_models_that_it_does_not_serve(server: SGLangServer) -> None:
    log = server.log_path.read_text()
    assert "Megatron" not in log
    assert "Ignore import error when loading" not in log  # said of a dozen of SGLang's own models


def test_the_cpu_server_computes_new_rows_only(server: SGLangServer) -> None:
    assert "attention by opd.serving.cpu_attention" in server.log_path.read_text()
