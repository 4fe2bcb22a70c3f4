"""What a run asks a server for when its scores are stored: nothing twice, and never another teacher's answer."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from opd.background_loop import BackgroundLoop
from opd.build_rewards import reward_functions
from opd.config.flags import parse_flags
from opd.errors import TeacherError
from opd.rollout.driver import RolloutDriver
from opd.teachers import score_cache
from opd.teachers.score_cache import ScoreCache, take_cache_stats
from opd.teachers.score_keys import ScoreRequest, TeacherScore
from opd.teachers.score_store import PROBES, ScoreStore
from opd.teachers.teacher_identity import local_text, served_text
from opd.types import Sample, SampleStatus

pytestmark = pytest.mark.unit

STUDENT = Path(__file__).parents[3] / "examples" / "on_policy_distillation" / "tiny_task" / "student"


class CountingTeacher:
    """A client and its server: what it says of itself, and which samples it was asked about."""

    def __init__(self, *, shift: float = 0.0, **info: Any) -> None:
        self.info = {"model_path": "/models/teacher", "weight_version": "default", "load_format": "auto", **info}
        self.server = {"dtype": "bfloat16", "startup_time": 1}
        self.shift = shift
        self.asked: list[list[int]] = []
        self.looks = 0
        self.failure: Exception | None = None
        self.http = self

    async def get(self, path: str) -> dict[str, Any]:
        self.looks += 1
        return self.info if path == "/model_info" else self.server

    async def score(self, tokens: list[int], response_length: int) -> list[float]:
        self.asked.append(list(tokens))
        await asyncio.sleep(0.001)
        if self.failure is not None:
            raise self.failure
        return [-0.5 - token / 64 + self.shift for token in tokens[-response_length:]]


def request(*tokens: int) -> ScoreRequest:
    return ScoreRequest(tokens=[9, *tokens], response_length=len(tokens))


def scores(cache: ScoreCache, teacher: CountingTeacher, *requests: ScoreRequest) -> list[list[float]]:
    async def one(asked: ScoreRequest) -> list[float]:
        async def ask() -> TeacherScore:
            return TeacherScore(logprobs=await teacher.score(asked.tokens, asked.response_length))

        return (await cache.score("http://t/generate", teacher, asked, ask)).logprobs

    async def run() -> list[list[float]]:
        return list(await asyncio.gather(*(one(r) for r in requests)))

    return asyncio.run(run())


def test_samples_that_come_at_once_for_the_same_tokens_ask_once(tmp_path: Path) -> None:
    teacher, cache = CountingTeacher(), ScoreCache(ScoreStore(tmp_path))
    found = scores(cache, teacher, *[request(1, 2)] * 4, request(3))
    assert teacher.asked == [[9, 1, 2], [9, 3]]
    assert found == [found[0]] * 4 + [[-0.5 - 3 / 64]]
    assert cache.take_stats() == {"cache_hits": 3, "cache_misses": 2}
    assert cache.take_stats() == {"cache_hits": 0, "cache_misses": 0}


def test_a_failure_is_told_to_all_that_wait_and_is_not_stored(tmp_path: Path) -> None:
    teacher, cache = CountingTeacher(), ScoreCache(ScoreStore(tmp_path))
    teacher.failure = TeacherError("unreachable: gone")

    async def ask() -> TeacherScore:
        return TeacherScore(logprobs=await teacher.score([9, 1], 1))

    async def run() -> list[Any]:
        both = (cache.score("t", teacher, request(1), ask) for _ in range(2))
        return await asyncio.gather(*both, return_exceptions=True)

    assert [str(result) for result in asyncio.run(run())] == ["unreachable: gone"] * 2
    teacher.failure = None
    scores(cache, teacher, request(1))
    assert len(teacher.asked) == 2


def test_a_sample_that_stops_waiting_leaves_the_score_to_the_others(tmp_path: Path) -> None:
    teacher, cache = CountingTeacher(), ScoreCache(ScoreStore(tmp_path))

    async def ask() -> TeacherScore:
        return TeacherScore(logprobs=await teacher.score([9, 1], 1))

    async def run() -> TeacherScore:
        first = asyncio.ensure_future(cache.score("t", teacher, request(1), ask))
        while not teacher.asked:
            await asyncio.sleep(0)
        second = asyncio.ensure_future(cache.score("t", teacher, request(1), ask))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(run()).logprobs == [-0.5 - 1 / 64]
    assert len(teacher.asked) == 1


@pytest.mark.parametrize(
    "other",
    [{"model_path": "/models/other"}, {"weight_version": "7"}, {"load_format": "dummy"}],
    ids=lambda info: next(iter(info)),
)
def test_another_teacher_is_asked_for_itself(tmp_path: Path, other: dict[str, Any]) -> None:
    scores(ScoreCache(ScoreStore(tmp_path)), CountingTeacher(), request(1))
    teacher = CountingTeacher(**other)
    scores(ScoreCache(ScoreStore(tmp_path)), teacher, request(1))
    assert teacher.asked == [[9, 1]]


def test_the_users_name_for_the_weights_tells_teachers_apart(tmp_path: Path) -> None:
    teacher = CountingTeacher()
    for name in (None, "july", "july"):
        scores(ScoreCache(ScoreStore(tmp_path), name=name), teacher, request(1))
    assert teacher.asked == [[9, 1]] * 3  # None, july, and july's one stored sample scored again


def test_other_weights_under_the_same_name_are_found_out_and_kept_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = CountingTeacher(), CountingTeacher(shift=-1 / 16)
    (old,) = scores(ScoreCache(ScoreStore(tmp_path)), first, request(1))
    (new,) = scores(ScoreCache(ScoreStore(tmp_path)), second, request(1))
    assert new == [old[0] - 1 / 16]
    assert "other weights under this teacher's name (0.0625 nats" in caplog.text
    for teacher in (first, second):  # both are known from now on
        teacher.asked.clear()
        (again,) = scores(ScoreCache(ScoreStore(tmp_path)), teacher, request(1))
        assert again == [old[0] + teacher.shift]
        assert len(teacher.asked) <= 2  # the stored samples that tell them apart, and nothing else
    near = CountingTeacher(shift=1 / 64)  # as a server in bfloat16 may differ from itself
    assert scores(ScoreCache(ScoreStore(tmp_path)), near, request(1)) == [old]


def test_a_restart_with_other_weights_in_the_middle_of_a_run_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_cache, "LOOK_SECONDS", 0.0)
    teacher, cache = CountingTeacher(), ScoreCache(ScoreStore(tmp_path))
    (old,) = scores(cache, teacher, request(1))
    teacher.server["startup_time"], teacher.shift = 2, -1.0
    assert scores(cache, teacher, request(1)) == [[old[0] - 1.0]]


def test_a_teacher_that_is_away_still_has_its_stored_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_cache, "LOOK_SECONDS", 0.0)
    teacher, cache = CountingTeacher(), ScoreCache(ScoreStore(tmp_path))
    kept = scores(cache, teacher, request(1))
    teacher.failure = TeacherError("unreachable: gone")

    async def refuse(path: str) -> dict[str, Any]:
        raise teacher.failure

    monkeypatch.setattr(teacher, "get", refuse)
    assert scores(cache, teacher, request(1)) == kept
    with pytest.raises(TeacherError, match="gone"):
        scores(cache, teacher, request(2))


def test_what_a_folder_on_this_machine_adds_to_the_identity(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32"}))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * 100)

    def served_as(**server: Any) -> str:
        model = {"model_path": str(tmp_path), "weight_version": "default", "load_format": "auto"}
        return served_text(model, {"dtype": "auto", "quantization": None, **server}, None)

    before = served_as()
    assert (
        before == served_as(kv_cache_dtype="auto") == local_text(tmp_path, "float32")
    )  # a folder run here is the same
    assert (
        len({before, served_as(dtype="bfloat16"), served_as(quantization="fp8"), served_as(kv_cache_dtype="fp8")}) == 4
    )
    stamp = weights.stat().st_mtime_ns
    os.utime(weights, ns=(stamp + 1, stamp + 1))
    assert served_as() != before  # written anew, with the same size


@asynccontextmanager
async def full_server(teacher: CountingTeacher) -> Any:
    """The teacher over HTTP."""

    async def generate(http_request: web.Request) -> web.Response:
        body = await http_request.json()
        ids, start = body["input_ids"], body["logprob_start_len"]
        values = [None, *await teacher.score(ids, len(ids) - start - 1)]
        entries = [[value, i, None] for value, i in zip(values, ids[start:], strict=True)]
        return web.json_response({"meta_info": {"input_token_logprobs": entries}})

    async def info(http_request: web.Request) -> web.Response:
        return web.json_response(await teacher.get(http_request.path))

    app = web.Application()
    app.add_routes([web.post("/generate", generate), web.get("/model_info", info), web.get("/server_info", info)])
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/generate"
    finally:
        await runner.cleanup()


def answers(count: int) -> list[Sample]:
    """As --sft-data gives them."""
    return [
        Sample(
            index=i,
            group_index=-1 - i,
            prompt="",
            tokens=[9, 9, i + 10, 1],
            response_length=2,
            status=SampleStatus.COMPLETED,
            rollout_log_probs=[0.0, 0.0],
            off_policy=True,
        )
        for i in range(count)
    ]


def train(url: str, folder: Path, samples: list[Sample]) -> dict[str, float]:
    """Scores answers as a run with these flags does; the metrics of it."""
    flags = f"--use-opd --opd-type sglang --rm-url {url} --opd-teacher-cache {folder} --opd-teacher-concurrency 4"
    config = parse_flags([*flags.split(), "--hf-checkpoint", str(STUDENT)])
    _, reward, post_process = reward_functions(config)
    driver = RolloutDriver(
        None,
        reward=reward,
        post_process=post_process,
        args=Namespace(**config.flat()),
        decode=str,
        take_scoring_stats=take_cache_stats,
    )
    take_cache_stats()
    try:
        return driver.score(samples).scoring
    finally:
        driver.close()


@contextmanager
def served(teacher: CountingTeacher) -> Iterator[str]:
    loop, stack = BackgroundLoop("server"), AsyncExitStack()
    try:
        yield loop.run(stack.enter_async_context(full_server(teacher)))
    finally:
        loop.run(stack.aclose())
        loop.close()


def test_a_second_run_with_the_same_cache_asks_only_who_the_teacher_is(tmp_path: Path) -> None:
    teacher, first, second = CountingTeacher(), answers(12), answers(12)
    with served(teacher) as url:
        assert train(url, tmp_path, first) == {"cache_hits": 0, "cache_misses": 12}
        assert len(teacher.asked) == 12
        teacher.asked.clear()
        assert train(url, tmp_path, second) == {"cache_hits": 12, "cache_misses": 0}
    assert len(teacher.asked) <= PROBES  # and they are its stored samples
    assert [s.teacher_log_probs.tolist() for s in second] == [s.teacher_log_probs.tolist() for s in first]
    assert first[3].teacher_log_probs.tolist() == [-0.5 - 13 / 64, -0.5 - 1 / 64]


def test_a_run_that_is_killed_does_not_pay_twice_for_what_was_scored(tmp_path: Path) -> None:
    teacher = CountingTeacher()
    start, tell = os.pipe()
    process = multiprocessing.get_context("fork").Process(
        target=lambda: train(os.read(start, 100).decode(), tmp_path, answers(200))
    )
    process.start()  # before this process has a server's thread
    with served(teacher) as url:
        os.write(tell, url.encode())
        while len(teacher.asked) < 60:
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        stored = ScoreStore(tmp_path).stats().entries
        assert stored >= 50
        teacher.asked.clear()
        assert train(url, tmp_path, answers(200)) == {"cache_hits": stored, "cache_misses": 200 - stored}
        assert len(teacher.asked) <= 200 - stored + PROBES
