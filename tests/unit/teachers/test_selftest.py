"""The start-up check of a teacher server: what it refuses, and the words it uses."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from opd.errors import TeacherError
from opd.teachers.selftest import check_teacher, ids_digest, probe_text

pytestmark = pytest.mark.unit

LARGEST_ID = 255


class ByteTokenizer:
    all_special_tokens = ("<eos>",)
    added_tokens_decoder = {254: "<eos>", 253: "<|im_start|>"}

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [(byte + self._offset) % 256 for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(LARGEST_ID + 1)}


def _check(
    tokenizer: Any = None,
    *,
    logprob: Callable[[float, int, int], float] = lambda temperature, call, position: -1.0,
    vocabulary: int = LARGEST_ID + 1,
    model_info: dict[str, Any] | int | None = None,
    tokenize: int = 200,
    own_tokenizer: str | None = None,
) -> None:
    """Runs the check against a server whose tokenizer has no offset.

    Args:
        logprob: of (request's temperature, number of the request, position).
    """
    info = {"model_path": "teacher", "is_generation": True} if model_info is None else model_info
    calls: list[int] = []

    async def get_info(request: web.Request) -> web.Response:
        return web.Response(status=info) if isinstance(info, int) else web.json_response(info)

    async def post_tokenize(request: web.Request) -> web.Response:
        if tokenize != 200:
            return web.Response(status=tokenize)
        body = await request.json()
        return web.json_response({"tokens": ByteTokenizer().encode(body["prompt"])})

    async def generate(request: web.Request) -> web.Response:
        body = await request.json()
        ids, temperature = body["input_ids"], body["sampling_params"]["temperature"]
        if max(body.get("token_ids_logprob") or [0]) >= vocabulary:
            return web.Response(status=400, text="token id out of range")
        calls.append(1)
        entries = [[logprob(temperature, len(calls), i) if i else None, token, None] for i, token in enumerate(ids)]
        return web.json_response({"meta_info": {"input_token_logprobs": entries}})

    async def run() -> None:
        app = web.Application()
        app.add_routes(
            [web.get("/model_info", get_info), web.post("/tokenize", post_tokenize), web.post("/generate", generate)]
        )
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/generate"
            await check_teacher(
                url, tokenizer or ByteTokenizer(), student_folder="student", own_tokenizer=own_tokenizer
            )
        finally:
            await runner.cleanup()

    asyncio.run(run())


def test_a_good_teacher_passes() -> None:
    _check()


def test_nobody_there() -> None:
    expected = r"`--rm-url=http://127.0.0.1:9/generate`: no teacher answers.*Start it first"
    with pytest.raises(TeacherError, match=expected):
        asyncio.run(check_teacher("http://127.0.0.1:9/generate", ByteTokenizer()))


def test_one_of_several_is_named_as_in_the_flags() -> None:
    shown = "`--opd-teachers math=http://127.0.0.1:9/generate`"
    with pytest.raises(TeacherError, match=f"{shown}: no teacher answers"):
        asyncio.run(check_teacher("http://127.0.0.1:9/generate", ByteTokenizer(), shown=shown))


def test_another_kind_of_server() -> None:
    with pytest.raises(TeacherError, match="no SGLang server"):
        _check(model_info=404)


def test_a_server_with_a_key() -> None:
    with pytest.raises(TeacherError, match="--opd-teacher-api-key-env"):
        _check(model_info=401)


def test_an_embedding_model() -> None:
    with pytest.raises(TeacherError, match="not a language model"):
        _check(model_info={"is_generation": False, "model_path": "e"})


def test_another_tokenizer() -> None:
    expected = r"the teacher `teacher` reads text as other token ids than the student `student`"
    with pytest.raises(TeacherError, match=f"{expected}.*--opd-teacher-tokenizer"):
        _check(ByteTokenizer(offset=1))


def test_a_teacher_over_text_is_compared_with_its_own_tokenizer() -> None:
    _check(own_tokenizer="`--opd-teacher-tokenizer=folder`")
    expected = r"other token ids than `--opd-teacher-tokenizer=folder`.*give the folder of the served model"
    with pytest.raises(TeacherError, match=expected):
        _check(ByteTokenizer(offset=1), own_tokenizer="`--opd-teacher-tokenizer=folder`")


def test_a_tokenizer_that_cannot_be_compared() -> None:
    with pytest.raises(TeacherError, match="--opd-skip-teacher-selftest"):
        _check(tokenize=404)


def test_a_smaller_vocabulary() -> None:
    with pytest.raises(TeacherError, match="refuses token id 255"):
        _check(vocabulary=255)


def test_scores_that_follow_the_requests_temperature() -> None:
    with pytest.raises(TeacherError, match="temperature 1"):
        _check(logprob=lambda temperature, call, position: -1.0 / max(temperature, 0.5))


def test_noisy_scores() -> None:
    with pytest.raises(TeacherError, match="twice"):
        _check(logprob=lambda temperature, call, position: -1.0 - 0.1 * (call % 2))


def test_digest_by_hand() -> None:
    assert ids_digest([1, 2]) == hashlib.sha256(b"[1, 2]").hexdigest()[:12]


def test_the_probe_spells_out_added_tokens_and_the_vocabulary() -> None:
    text = probe_text(ByteTokenizer())
    assert text.count("<eos>") == 1
    assert "<|im_start|>" in text
    assert all(chr(i) in text for i in range(LARGEST_ID + 1))
