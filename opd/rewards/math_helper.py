"""One helper process that grades mathematics with math-verify, under a time limit that holds.

``MathHelper`` is the parent's side. Run as a script, this file is the process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import select
import signal
import subprocess
import sys

START_LIMIT = 120.0  # seconds until the helper has imported sympy
READY = "ready"


class MathGraderError(RuntimeError):
    """The helper process cannot grade at all."""


class HelperEndedError(MathGraderError):
    """A helper process ended by itself, or was ended by another one."""


class MathHelper:
    """A started process; one answer at a time, and one thread at a time. After an error, ``stop`` is all it can do.

    Raises:
        MathGraderError: it did not start, or math-verify is not installed.
    """

    def __init__(self, time_limit: float) -> None:
        self._time_limit = time_limit
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(time_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        try:
            first = self._read(START_LIMIT)
            if first != READY:
                raise MathGraderError(first)
        except TimeoutError as error:
            self.stop()
            raise MathGraderError(f"the math grader did not start within {START_LIMIT:g} s") from error
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def grade(self, answer: str, label: str) -> bool:
        """Whether the two texts mean the same.

        Raises:
            TimeoutError: it took over the time limit.
            HelperEndedError: the process ended.
        """
        try:
            self._process.stdin.write(json.dumps([answer, label]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return self._read(self._time_limit) == "1"

    def kill(self) -> None:
        """Ends the process, from any thread; the one that waits for an answer sees it end."""
        self._process.kill()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # what could not be written is lost
            self._process.stdin.close()

    def _read(self, limit: float) -> str:
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(1000 * limit):
            raise TimeoutError
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return line.rstrip("\n")

    def _ended(self) -> Exception:
        status = self._process.wait()
        if status == -signal.SIGALRM:  # its own limit came first: this process was kept from running
            return TimeoutError()
        return HelperEndedError(
            f"the math grader's helper process ended with status {status}; its last words are on stderr"
        )


def serve(time_limit: float) -> None:
    """The process: one JSON line ``[answer, label]`` in, one line ``0`` or ``1`` out, until stdin closes.

    The parent keeps the limit. The alarm is for the process whose parent is gone: it ends even inside a C call.
    """
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
        signal.alarm(math.ceil(time_limit) + 1)
        answer, label = json.loads(line)
        gold = answers(label)
        right = bool(gold) and verify(gold, answers(answer), timeout_seconds=None)
        signal.alarm(0)
        print(int(right), flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
