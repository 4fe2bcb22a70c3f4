"""Servers of one teacher that hold different models are told apart before the first rollout."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from opd.errors import TeacherError
from opd.teachers.agreement import check_agreement
from opd.teachers.sglang_teacher import SGLangTeacher
from tests.unit.serving.fake_sglang import FakeSGLang
from tests.unit.teachers.test_selftest import ByteTokenizer

pytestmark = pytest.mark.unit


def off_by(nats: float) -> Any:
    def change(answer: dict[str, Any]) -> None:
        for entry in answer["meta_info"]["input_token_logprobs"][1:]:
            entry[0] += nats

    return change


def check(*faults: Any) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            fakes = [await stack.enter_async_context(FakeSGLang(fault).running()) for fault in faults]
            servers = [SGLangTeacher(fake.url) for fake in fakes]
            try:
                await check_agreement(servers, ByteTokenizer(), shown="`--rm-url=...`")
            finally:
                for server in servers:
                    await server.close()

    asyncio.run(run())


def test_the_noise_of_one_precision_is_no_difference() -> None:
    check(None, off_by(0.02), off_by(-0.02))


def test_another_model_at_the_third_address_is_named() -> None:
    with pytest.raises(TeacherError, match=r"--rm-url=...`: http://\S+ and http://\S+ score the same text with a diff"):
        check(None, None, off_by(0.5))


def test_a_server_that_cannot_score_is_no_agreement() -> None:
    with pytest.raises(TeacherError, match="broke off while scoring a probe text .http_status"):
        check(None, 400)
