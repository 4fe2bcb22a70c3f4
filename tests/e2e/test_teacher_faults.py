"""A teacher server that goes away and comes back during a run, and one that answers badly: no sample is lost."""

from __future__ import annotations

import time

import pytest

from tests.e2e.fault_proxy import FaultProxy, minus_infinity, nan, one_too_few, wrong_id
from tests.e2e.runs import rows, run, start
from tests.e2e.test_faults import sglang_flags

pytestmark = pytest.mark.e2e


def test_a_teacher_killed_and_restarted_on_its_port_in_mid_run(tmp_path, teacher_server):
    folder, log = tmp_path / "run", tmp_path / "log"
    server = teacher_server()
    process = start(sglang_flags(folder, server.port, num_rollout=16, opd_teacher_retries=0), log=log)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < 2:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        server.stop()
        steps_before = len(rows(folder))
        teacher_server(server.port)
        steps_without = len(rows(folder))
        assert process.wait(120) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()
    assert steps_before < 16 and steps_without <= steps_before + 1  # it waited: there was something to wait for
    assert [row["step"] for row in rows(folder)] == list(range(1, 17))
    assert [row["unscored_share"] for row in rows(folder)] == [0.0] * 16
    assert sum(row["teacher_breaker_openings"] for row in rows(folder)) >= 1
    assert sum(row["teacher_failures"] for row in rows(folder)) == 0


def test_one_run_through_every_bad_answer(tmp_path, teacher_server):
    """503 for 20 s and answers that break off cost time; scores that cannot be right cost their samples' scores."""
    folder = tmp_path / "run"
    faults = {2: "unavailable", 3: "truncated", 4: nan, 5: minus_infinity, 6: one_too_few, 7: wrong_id}

    def steps_done() -> int:
        return len(rows(folder)) if (folder / "metrics.jsonl").exists() else 0

    proxy = FaultProxy(teacher_server().url, steps_done, faults)
    with proxy.running() as port:
        run(sglang_flags(folder, port, num_rollout=8, opd_teacher_retries=3), log=tmp_path / "log")
    table = rows(folder)
    assert [row["step"] for row in table] == list(range(1, 9))
    assert [row["unscored_share"] for row in table] == [0, 0, 0, 0.25, 0.25, 0.25, 0.25, 0]
    assert [row["samples"] for row in table] == [16] * 8
    assert table[1]["time_step"] > 15 and table[1]["teacher_failures"] == table[2]["teacher_failures"] == 0
    assert proxy.seen[2] > 1 and proxy.seen[3] > 3
