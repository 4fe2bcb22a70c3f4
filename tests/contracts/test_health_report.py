"""The health report of a real SGLang server: nothing to complain about, and what it says is true."""

from __future__ import annotations

import asyncio

import pytest

from opd.serving.server import SGLangServer
from opd.teachers.health_report import check_health
from opd.teachers.health_rows import HealthReport, HealthSettings, Verdict
from opd.teachers.sglang_teacher import SGLangTeacher
from tests.contracts.conftest import CONTEXT, TinyModel, make_tokenizer

pytestmark = pytest.mark.contracts


def test_a_stock_server_has_no_fault(server: SGLangServer, tiny_a: TinyModel) -> None:
    settings = HealthSettings(prompt_tokens=200, response_tokens=32, samples=4, in_flight=8, exact=True)

    async def report() -> HealthReport:
        client = SGLangTeacher(server.url, retries=0, concurrency=8, lead_prompts=False)
        try:
            return await check_health(client, settings, tokenizer=make_tokenizer(), student_folder=tiny_a.folder)
        finally:
            await client.close()

    found = asyncio.run(report())
    assert [row.check for row in found.rows if row.verdict is Verdict.FAIL] == []
    assert abs(found.row("largest context").numbers["tokens"] - CONTEXT) <= 16
    assert found.row("prefix cache").numbers["cached_prompt_tokens"] >= 198
    assert 20 < found.row("bytes per scored token").numbers["bytes_per_token"] < 60
    assert found.row("repeatability").numbers["difference_nats_from_the_cache"] < 1e-4
