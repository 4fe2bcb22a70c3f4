"""Helper processes of the math grader: how many, what one answer may cost the others, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from opd.rewards.math_grader import PATIENCE, MathGrader, MathGraderError

pytestmark = pytest.mark.unit

ENDLESS = r"\boxed{10^{10^{10}}}"


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(time_limit=120.0, helpers=2)
    yield grader
    grader.close()


def test_one_answer_after_another_needs_one_helper(grader):
    assert [grader.grade(rf"\boxed{{{i % 2}}}", "1") for i in range(6)] == [0.0, 1.0] * 3
    assert len(grader.pids()) == 1


def test_usual_answers_at_once_share_the_helper_there_is(grader):
    before = grader.pids()
    with ThreadPoolExecutor(8) as threads:
        rewards = list(threads.map(lambda i: grader.grade(rf"\boxed{{{i % 3}}}", "1"), range(24)))
    assert rewards == [float(i % 3 == 1) for i in range(24)]
    assert grader.pids() == before


def test_quick_answers_pass_a_slow_one(grader):
    with ThreadPoolExecutor(8) as threads:
        slow = threads.submit(grader.grade, ENDLESS, "4")
        (busy,) = _at_work(grader, 1)
        quick = [r"\boxed{4}", r"\boxed{5}", r"\boxed{2^2}"]
        assert list(threads.map(lambda response: grader.grade(response, "4"), quick)) == [1.0, 0.0, 1.0]
        assert len(grader.pids()) == 2
        assert not slow.done()
        _run_out_of_time(busy)
        assert slow.result() == 0.0


def test_slow_answers_run_at_once_and_no_more_than_the_most(grader):
    with ThreadPoolExecutor(8) as threads:
        slow = [threads.submit(grader.grade, ENDLESS, "4") for _ in range(3)]
        both = _at_work(grader, 2)
        assert not any(answer.done() for answer in slow)
        time.sleep(2 * PATIENCE)  # the third answer has waited long enough for a third helper
        assert len(grader.pids()) == 2
        _run_out_of_time(*both)
        _run_out_of_time(*_at_work(grader, 1, besides=both))
        assert [answer.result() for answer in slow] == [0.0] * 3
        assert grader.grade(r"\boxed{4}", "4") == 1.0


def test_a_helper_that_is_killed_loses_no_answer(grader):
    assert grader.grade(r"\boxed{4}", "4") == 1.0
    for pid in grader.pids():  # while idle
        os.kill(pid, signal.SIGKILL)
    assert grader.grade(r"\boxed{4}", "4") == 1.0
    with ThreadPoolExecutor(1) as threads:  # at work
        answer = threads.submit(grader.grade, ENDLESS, "4")
        first = _at_work(grader, 1)
        os.kill(*first, signal.SIGKILL)
        second = _at_work(grader, 1, besides=first)
        assert not answer.done()  # graded again
        _run_out_of_time(*second)
        assert answer.result() == 0.0


def test_an_answer_that_ends_two_helpers_is_an_error(grader):
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(grader.grade, ENDLESS, "4")
        first = _at_work(grader, 1)
        os.kill(*first, signal.SIGSEGV)
        os.kill(*_at_work(grader, 1, besides=first), signal.SIGSEGV)
        with pytest.raises(MathGraderError, match=f"status -{signal.SIGSEGV:d}"):
            answer.result()
    assert grader.grade(r"\boxed{4}", "4") == 1.0


def test_close_ends_all_and_grading_starts_anew(grader):
    assert grader.grade(r"\boxed{4}", "4") == 1.0
    pids = grader.pids()
    grader.close()
    grader.close()
    assert grader.pids() == []
    assert not any(map(_runs, pids))
    assert grader.grade(r"\boxed{4}", "4") == 1.0


def test_a_degenerate_answer_starts_no_helper():
    grader = MathGrader()
    assert grader.grade(r"\boxed{" + "(" * 500 + "4" + ")" * 500 + "}", "4") == 0.0
    assert grader.pids() == []


def test_a_helper_deep_in_an_answer_ends_after_its_parent():
    program = (
        "import sys, threading, time; from opd.rewards.math_grader import MathGrader; grader = MathGrader(1.0)\n"
        f"threading.Thread(target=grader.grade, args=({ENDLESS!r}, '4'), daemon=True).start()\n"
        "while not grader.pids(): time.sleep(0.01)\n"
        "time.sleep(0.3); print(grader.pids()[0], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert _runs(pid)
        parent.kill()
    _wait_until(lambda: not _runs(pid))


def _at_work(grader: MathGrader, number: int, besides: set[int] = frozenset()) -> set[int]:
    """Waits until so many helpers besides those grade an answer; their process ids."""
    found: set[int] = set()

    def all_at_work() -> bool:
        with grader._changed:
            found.clear()
            found.update({helper.pid for helper in grader._busy()} - besides)
        return len(found) == number and all(map(_computes, found))

    _wait_until(all_at_work)
    return set(found)


def _run_out_of_time(*pids: int) -> None:
    """Ends helpers by their own alarm, long before it is due: no test waits for a limit."""
    for pid in pids:
        os.kill(pid, signal.SIGALRM)


def _computes(pid: int) -> bool:
    """Inside the answer, and no longer waiting for it."""
    return _state(pid) == "R"


def _wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    return _state(pid) not in ("", "Z")  # a zombie has ended; nobody may reap it here


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""
