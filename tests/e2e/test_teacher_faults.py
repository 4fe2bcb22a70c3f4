"""A teacher server that answers badly, that is not the student's, and that goes away, for a while or for good."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from opd.serving.server import SGLangServer
from tests.e2e.conftest import START_SECONDS
from tests.e2e.fault_proxy import FaultProxy, minus_infinity, nan, one_too_few, wrong_id
from tests.e2e.runs import TASK, error_line, rows, run, sglang_flags, start, wait_for_steps

pytestmark = pytest.mark.e2e


def kill(server: SGLangServer) -> None:
    os.killpg(server.pid, signal.SIGKILL)


def test_one_run_through_every_bad_answer(tmp_path: Path, teacher: SGLangServer) -> None:
    """503 for 20 s and answers that break off cost time; scores that cannot be right cost their samples' scores."""
    folder = tmp_path / "run"
    faults = {2: "unavailable", 3: "truncated", 4: nan, 5: minus_infinity, 6: one_too_few, 7: wrong_id}

    def steps_done() -> int:
        return len(rows(folder)) if (folder / "metrics.jsonl").exists() else 0

    proxy = FaultProxy(teacher.url, steps_done, faults)
    with proxy.running() as port:
        run(sglang_flags(folder, port, num_rollout=8, opd_teacher_retries=3), log=tmp_path / "log")
    table = rows(folder)
    assert [row["step"] for row in table] == list(range(1, 9))
    assert [row["unscored_share"] for row in table] == [0, 0, 0, 0.25, 0.25, 0.25, 0.25, 0]
    assert [row["samples"] for row in table] == [16] * 8
    assert table[1]["time_step"] > 15 and table[1]["teacher_failures"] == table[2]["teacher_failures"] == 0
    assert proxy.seen[2] > 1 and proxy.seen[3] > 3


def test_a_teacher_with_another_tokenizer(tmp_path: Path, teacher: SGLangServer) -> None:
    """Two words of the student's have each other's id."""
    student = tmp_path / "student"
    student.mkdir()
    for file in (TASK / "student").iterdir():
        text = file.read_bytes()
        if file.name == "tokenizer.json":
            tokenizer = json.loads(text)
            vocabulary = tokenizer["model"]["vocab"]
            first, second = (next(w for w in vocabulary if w.strip() == word) for word in ("buys", "finds"))
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
            text = json.dumps(tokenizer).encode()
        (student / file.name).write_bytes(text)
    flags = sglang_flags(tmp_path / "run", teacher.port, hf_checkpoint=student)
    assert "tokenizer" in error_line(run(flags, log=tmp_path / "log", expect=1))


def test_a_teacher_killed_and_restarted_on_its_port_in_mid_run(tmp_path: Path, teacher: SGLangServer) -> None:
    folder, log, steps = tmp_path / "run", tmp_path / "log", 8
    process = start(sglang_flags(folder, teacher.port, num_rollout=steps, opd_teacher_retries=0), log=log)
    try:
        wait_for_steps(process, folder, 2, log=log)
        kill(teacher)
        steps_before = len(rows(folder))
        teacher.restart()
        teacher.wait_ready(START_SECONDS)
        steps_without = len(rows(folder))
        assert process.wait(120) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()
    assert steps_before < steps and steps_without <= steps_before + 1  # it waited: there was something to wait for
    assert [row["step"] for row in rows(folder)] == list(range(1, steps + 1))
    assert [row["unscored_share"] for row in rows(folder)] == [0.0] * steps
    assert sum(row["teacher_breaker_openings"] for row in rows(folder)) >= 1
    assert sum(row["teacher_failures"] for row in rows(folder)) == 0


def test_a_teacher_that_dies_during_the_run(tmp_path: Path, teacher: SGLangServer) -> None:
    """The run stops after saving; with the teacher back, it goes on from the step it was at."""
    folder, log = tmp_path / "run", tmp_path / "log"
    saving = {"save": folder / "checkpoints", "load": folder / "checkpoints", "num_rollout": 30}
    saving |= {"opd_teacher_deadline": 3, "opd_teacher_wait": 1}
    process = start(sglang_flags(folder, teacher.port, **saving), log=log)
    try:
        wait_for_steps(process, folder, 2, log=log)
        kill(teacher)
        assert process.wait(120) == 1
    finally:
        process.kill()
        process.wait()
    message = error_line(log.read_text())
    assert "have no teacher score, more than --opd-max-unscored-share=0.5" in message
    done = rows(folder)[-1]["step"]
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == str(done)

    teacher.restart()
    teacher.wait_ready(START_SECONDS)
    run(sglang_flags(folder, teacher.port, **saving | {"num_rollout": done + 2}), log=tmp_path / "again.log")
    assert [row["step"] for row in rows(folder)] == list(range(1, done + 3))
    assert rows(folder)[-1]["unscored_share"] == 0
