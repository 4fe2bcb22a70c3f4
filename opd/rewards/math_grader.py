"""Math answers compared by meaning (``\\frac12`` equals ``0.5``), with a time limit that holds.

math-verify evaluates what the model wrote, and ``10^{10^{10}}`` keeps sympy inside one C call for hours. Its own limit
is a Unix signal, which works in the main thread only and cannot interrupt that call. So grading happens in a helper
process that is killed, and replaced, when an answer takes too long. Run as a script, this file is that process.
"""

from __future__ import annotations

import atexit
import json
import logging
import queue
import subprocess
import sys
import threading

logger = logging.getLogger(__name__)

TIME_LIMIT = 10.0  # seconds for one answer; usual ones take a few milliseconds
START_LIMIT = 120.0  # seconds until the helper has imported sympy
READY = "ready"


class MathGraderError(RuntimeError):
    """The helper process cannot grade at all."""


class MathGrader:
    """Grades one answer at a time; threads wait for each other. The helper starts with the first answer."""

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        self._time_limit = time_limit
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def grade(self, response: str, label: str) -> float:
        """1.0 where the response's final answer means the same as the label; 0.0 otherwise, or out of time.

        Raises:
            MathGraderError: math-verify is not installed, or the helper process ended by itself.
        """
        with self._lock:
            helper = self._start() if self._helper is None else self._helper
            try:
                helper.stdin.write(json.dumps([response, label]) + "\n")
                helper.stdin.flush()
                return 1.0 if self._read(helper, self._time_limit) == "1" else 0.0
            except queue.Empty:
                logger.warning("grading took over %g s: the answer counts as wrong (label %r)", self._time_limit, label)
                self._stop()
                return 0.0
            except BrokenPipeError as error:
                self._stop()
                raise MathGraderError(_ended(helper)) from error

    def close(self) -> None:
        """Ends the helper process. Safe to call twice; a later ``grade`` starts a new one."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        helper = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self._helper = helper
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_pump, args=(helper, self._lines), name="math-grader", daemon=True).start()
        try:
            first = self._read(helper, START_LIMIT)
        except queue.Empty as error:
            self._stop()
            raise MathGraderError(f"the math grader did not start within {START_LIMIT:g} s") from error
        if first != READY:
            self._stop()
            raise MathGraderError(first)
        return helper

    def _read(self, helper: subprocess.Popen[str], limit: float) -> str:
        line = self._lines.get(timeout=limit)
        if not line:
            self._stop()
            raise MathGraderError(_ended(helper))
        return line.rstrip("\n")

    def _stop(self) -> None:
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()
            self._helper.stdin.close()
            self._helper = None


def _pump(helper: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    """Moves the helper's lines to the queue; "" says that it ended."""
    with helper.stdout:
        for line in helper.stdout:
            lines.put(line)
    lines.put("")


def _ended(helper: subprocess.Popen[str]) -> str:
    return f"the math grader's helper process ended with status {helper.wait()}; its last words are on stderr"


def last_boxed(text: str) -> str | None:
    r"""The last ``\boxed{...}`` of the text, braces matched; None without a complete one."""
    end_of_search = len(text)
    while (start := text.rfind("\\boxed{", 0, end_of_search)) >= 0:
        depth = 0
        for i in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start : i + 1]
        end_of_search = start
    return None


def serve() -> None:
    """The helper: one JSON line ``[response, label]`` in, one line ``0`` or ``1`` out, until stdin closes."""
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as error:
        print(f"`--rm-type=math` needs the package math-verify ({error}). Install it: pip install math-verify")
        return
    logging.disable(logging.WARNING)  # it warns on every start that its own time limit is off, which is meant
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def answers(text: str) -> list:
        return parse(text, extraction_config=targets, parsing_timeout=None)

    print(READY, flush=True)
    for line in sys.stdin:
        response, label = json.loads(line)
        gold = answers(last_boxed(label) or f"\\boxed{{{label.strip().strip('$')}}}")
        # Of several boxes math-verify makes a set; the last is the answer, as MATH and its graders take it.
        found = answers(last_boxed(response) or response)
        print(int(bool(gold) and verify(gold, found, timeout_seconds=None)), flush=True)


_shared = MathGrader()
atexit.register(_shared.close)


def grade_math(response: str, label: str) -> float:
    """``MathGrader.grade`` on the process's one grader."""
    return _shared.grade(response, label)


if __name__ == "__main__":
    serve()
