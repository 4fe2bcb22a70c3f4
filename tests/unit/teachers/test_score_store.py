"""What is found again, what never is, and what a kill, a full disk or a broken file costs."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.teachers.score_keys import ScoreRequest, TeacherScore, pack_score, unpack_score
from opd.teachers.score_store import FILE, PROBES, ScoreStore
from opd.teachers.top_scores import TopRequest
from opd.types import TopLogprobs

pytestmark = pytest.mark.unit

FORK = multiprocessing.get_context("fork")
REQUEST = ScoreRequest(tokens=[5, 6, 7, 8], response_length=2)
SCORE = TeacherScore(logprobs=[-0.5, -1.25])


def numbered(i: int, length: int = 2) -> tuple[ScoreRequest, TeacherScore]:
    tokens = [i, 1, *range(2, length + 2)]
    return ScoreRequest(tokens=tokens, response_length=length), TeacherScore(logprobs=[-float(i)] * length)


def test_a_score_is_found_by_another_store_of_the_folder(tmp_path: Path) -> None:
    first = ScoreStore(tmp_path / "new" / "folder")
    assert first.get("a", REQUEST) is None
    first.put("a", REQUEST, SCORE)
    second = ScoreStore(tmp_path / "new" / "folder")  # while the first is open, as another process has it
    assert second.get("a", REQUEST) == SCORE
    assert (first.stats().hits, first.stats().misses, second.stats().hits, second.stats().entries) == (0, 1, 1, 1)


TOP = TopRequest(count=2, support="student", vocab_size=9)


@pytest.mark.parametrize(
    ("teacher", "change"),
    [
        ("b", {}),
        ("a", {"tokens": [5, 6, 7, 9]}),
        ("a", {"response_length": 1}),  # another prompt
        ("a", {"temperature": 0.5}),
        ("a", {"top": replace(TOP, count=3)}),
        ("a", {"top": replace(TOP, support="teacher")}),
        ("a", {"student_ids": torch.tensor([[1, 2], [3, 5]])}),
        ("a", {"top": None}),
    ],
    ids=str,
)
def test_no_other_question_has_the_same_key(teacher: str, change: dict[str, object]) -> None:
    asked = replace(REQUEST, top=TOP, student_ids=torch.tensor([[1, 2], [3, 4]]))
    assert replace(asked, **change).key(teacher) != asked.key("a")
    assert replace(asked).key("a") == asked.key("a")


def test_likely_tokens_come_back_as_they_were() -> None:
    request = replace(REQUEST, top=TopRequest(count=2, support="union", vocab_size=2**18))
    top = TopLogprobs(ids_TK=torch.tensor([[2**17, 1, -1], [4, 3, 7]]), logprobs_TK=-torch.rand(2, 3))
    value = pack_score(TeacherScore(logprobs=SCORE.logprobs, top=top))
    found = unpack_score(value, request)
    assert torch.equal(found.top.ids_TK, top.ids_TK.int()) and torch.equal(found.top.logprobs_TK, top.logprobs_TK)
    assert found.top.ids_TK.dtype is torch.int32 and found.logprobs == SCORE.logprobs
    with pytest.raises(ValueError, match="vocabulary of 100"):  # an id that this student does not have
        unpack_score(value, replace(request, top=TopRequest(count=2, support="union", vocab_size=100)))


def test_likely_tokens_of_a_score_without_any_are_a_readers(tmp_path: Path) -> None:
    likely = TopLogprobs(ids_TK=torch.tensor([[3, 1], [4, 2]]), logprobs_TK=-torch.rand(2, 2))
    store = ScoreStore(tmp_path)
    store.put("a", REQUEST, replace(SCORE, likely=likely))
    found = store.get("a", REQUEST)
    assert found.top is None and torch.equal(found.likely.ids_TK, likely.ids_TK.int())
    store.put("a", REQUEST, SCORE)
    assert store.get("a", REQUEST).likely is None


def test_a_value_that_is_not_whole_or_does_not_fit_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ScoreStore(tmp_path)
    store.put("a", REQUEST, TeacherScore(logprobs=[-0.5]))  # too short for the request
    assert store.get("a", REQUEST) is None
    store.put("a", REQUEST, SCORE)
    database = sqlite3.connect(tmp_path / FILE)
    (value,) = database.execute("SELECT value FROM scores").fetchone()
    for damaged in (value[:-1], value[:5], value[:-1] + bytes([value[-1] ^ 1])):
        database.execute("UPDATE scores SET value = ?", (damaged,))
        database.commit()
        assert store.get("a", REQUEST) is None
    assert "damaged" in caplog.text


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    bound = 2_000_000
    store = ScoreStore(tmp_path, max_bytes=bound)
    for i in range(100):
        store.put("a", *numbered(i, 2500))
    store.get("a", numbered(0)[0])
    kept = numbered(0, 2500)[0]
    for i in range(100, 400):
        assert store.get("a", kept) is not None, f"dropped before the {i}th"
        store.put("a", *numbered(i, 2500))
    assert store.stats().bytes < 1.1 * bound
    assert store.get("a", numbered(399, 2500)[0]) is not None
    assert store.get("a", numbered(1, 2500)[0]) is None
    store.close()
    smaller = ScoreStore(tmp_path, max_bytes=bound // 4)
    smaller.close()
    assert (tmp_path / FILE).stat().st_size < bound // 3  # the file itself shrinks


def write_on(folder: Path, name: str, done: Any) -> None:
    """In a process of its own: one score after the other, each told when it is kept."""
    store = ScoreStore(folder)
    for i in range(10**6):
        store.put(name, *numbered(i))
        os.write(done, f"{i}\n".encode())


def test_a_kill_loses_nothing_that_was_kept_and_two_writers_do_not_mind(tmp_path: Path) -> None:
    told = {}
    for name in ("a", "b"):
        told[name], done = os.pipe()
        process = FORK.Process(target=write_on, args=(tmp_path, name, done), name=name)
        process.start()
        os.close(done)
    last = dict.fromkeys(told, -1)
    for name, pipe in told.items():
        with os.fdopen(pipe) as lines:
            for line in lines:  # ends with the process
                last[name] = int(line)
                if last[name] == 200:  # the other one writes at the same time
                    next(p for p in multiprocessing.active_children() if p.name == name).kill()
    store = ScoreStore(tmp_path)
    for name, count in last.items():
        assert count >= 200
        assert all(store.get(name, numbered(i)[0]) == numbered(i)[1] for i in range(count + 1))
    (verdict,) = sqlite3.connect(tmp_path / FILE).execute("PRAGMA integrity_check").fetchone()
    assert verdict == "ok"


def fill(folder: Path, log: Path) -> None:
    logging.getLogger("opd").addHandler(logging.FileHandler(log))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # as a disk that is full then
    store = ScoreStore(folder)
    for i in range(100):
        store.put("a", *numbered(i, 2000))
    found = sum(store.get("a", numbered(i, 2000)[0]) is not None for i in range(100))
    os._exit(found)  # 0 to 100


def test_a_full_disk_ends_the_writing_with_one_warning(tmp_path: Path) -> None:
    process = FORK.Process(target=fill, args=(tmp_path, tmp_path / "log"))
    process.start()
    process.join(60)
    assert 10 < process.exitcode < 100  # what was kept before is still found
    (warning,) = (tmp_path / "log").read_text().splitlines()
    assert "cannot be written" in warning


def test_a_broken_file_costs_the_store_and_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    store = ScoreStore(tmp_path)
    for i in range(3):
        store.put("a", *numbered(i))
        assert store.get("a", numbered(i)[0]) is None
    assert (store.stats().entries, store.stats().bytes, store.probes("a")) == (0, 0, [])
    store.close()
    assert [r.message for r in caplog.records if "cannot be used" in r.message] == [r.message for r in caplog.records]
    assert len(caplog.records) == 1


def test_a_folder_that_cannot_be_made_costs_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    store = ScoreStore(tmp_path / "file" / "folder")
    store.put("a", REQUEST, SCORE)
    assert store.get("a", REQUEST) is None
    assert len(caplog.records) == 1


def test_a_teacher_keeps_its_first_samples_to_be_scored_again(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    long_request, long_score = numbered(0, 5000)
    top = TopLogprobs(ids_TK=torch.ones(5000, 1, dtype=torch.int64), logprobs_TK=torch.full((5000, 1), -1.0))
    long_request = replace(long_request, top=TopRequest(count=1, vocab_size=9000))
    store.put("a", long_request, replace(long_score, top=top))
    for i in range(1, 9):
        store.put("a", *numbered(i))
    store.put("b", *numbered(9))
    first, *rest = store.probes("a")
    assert len(rest) == PROBES - 1
    assert first.request.tokens == long_request.tokens[: len(first.request.tokens)]
    assert len(first.logprobs) == first.request.response_length == len(first.request.tokens) - 2 < 1000
    assert [probe.request.tokens[0] for probe in store.probes("b")] == [9]
