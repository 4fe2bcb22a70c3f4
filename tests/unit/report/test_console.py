"""The console: plain lines in a pipe, bars on a terminal, ``opd`` log records in between."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import time

import pytest

from opd.report import console as console_module
from opd.report.console import Console, accuracies, format_step

ROW = {
    "step": 5,
    "reward_mean": 0.5312,
    "opd_reverse_kl": 0.08312,
    "response_length_mean": 33.4,
    "time_rollout": 0.61,
    "time_teacher": 0.11,
    "time_train": 0.74,
    "time_sync": 0.03,
    "time_step": 1.52,
}


def test_the_step_line() -> None:
    expected = (
        "step  5/40  reward 0.531  reverse KL 0.0831  length 33  1.5 s (rollout 0.6, teacher 0.1, train 0.7, sync 0.0)"
    )
    assert format_step(ROW, 40) == expected
    assert format_step({**ROW, "eval_accuracy": 0.55, "unscored_share": 0.125}, 40) == (
        expected + "  unscored 12%  accuracy 55.0%"
    )


def test_the_step_line_leaves_out_what_is_not_known() -> None:
    assert format_step({"step": 0, "eval_accuracy": 0.34}, 40) == "step  0/40  accuracy 34.0%"
    assert format_step({"step": 1, "reward_mean": None, "policy_loss": 0.5}, 3) == "step 1/3  loss 0.5000"


def test_several_evaluation_sets_are_named_and_one_is_not() -> None:
    two = {"eval_accuracy": 0.5, "eval/gsm8k_accuracy": 0.5, "eval/math500_accuracy": 0.25}
    assert accuracies(two) == [("gsm8k accuracy", 0.5), ("math500 accuracy", 0.25)]
    assert accuracies({"eval_accuracy": 0.5, "eval/eval_accuracy": 0.5}) == [("accuracy", 0.5)]
    assert accuracies({"step": 1}) == []


def test_without_a_terminal_only_whole_plain_lines_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Console(2, stream=stream) as console:
        for step in (1, 2):
            console.phase("rollout")
            with console.rollout(50) as rollout:
                for _ in range(50):
                    rollout.advance(30)
            console.step_line({**ROW, "step": step})
        console.note("a [bold]note[/bold] " + "x" * 200)
        console.warn("careful")
    lines = stream.getvalue().split("\n")
    assert [line[:8] for line in lines] == ["step 1/2", "step 2/2", "a [bold]", "warning:", ""]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())


def test_a_long_rollout_without_a_terminal_shows_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(1, stream=stream)
    with console.rollout(128) as rollout:
        for _ in range(128):
            now[0] += 1.0
            rollout.advance(100)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  rollout: 31/128 samples, 100 tokens/s"
    assert len(lines) == 128 // (console_module.HEARTBEAT_SECONDS + 1)


def test_opd_loggers_write_to_the_console_while_it_is_open() -> None:
    stream = io.StringIO()
    opd_logger = logging.getLogger("opd")
    handlers, propagate = list(opd_logger.handlers), opd_logger.propagate
    with Console(1, stream=stream):
        logging.getLogger("opd.teachers.any").warning("teacher %s is slow", "A")
    assert stream.getvalue() == "warning: teacher A is slow\n"
    assert (opd_logger.handlers, opd_logger.propagate) == (handlers, propagate)


def test_on_a_terminal_bars_count_steps_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        with Console(4, start_step=2, stream=terminal) as console:
            assert console.live
            with console.rollout(8) as rollout:
                for _ in range(3):
                    rollout.advance(10)
                console._progress.refresh()
            console.step_line({**ROW, "step": 3})
            console._progress.refresh()
        terminal.flush()
        shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    for expected in ("steps", "2/4", "rollout", "3/8", "tokens/s", "step 3/4", "3/4"):
        assert expected in shown
