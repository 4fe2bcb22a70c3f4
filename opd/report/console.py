"""What scrolls by during a run: a bar over steps, one within the rollout, one readable line per step.

On a terminal the bars are live. Into a file or a pipe only whole lines are written: no control characters, no bars.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

PHASES = ("rollout", "teacher", "train", "sync")
PLAIN_WIDTH = 120  # columns of tables when there is no terminal to ask
HEARTBEAT_SECONDS = 30.0  # without a terminal, a long rollout says so at most this often


class RolloutProgress:
    """Counts finished samples and their tokens; returned by ``Console.rollout``."""

    def __init__(self, console: Console, total: int, label: str) -> None:
        self.total = total
        self.finished = 0
        self.tokens = 0
        self._console = console
        self._label = label
        self._start = self._last_line = time.monotonic()
        self._bar = console._progress.add_task(label, total=total, detail="")

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(time.monotonic() - self._start, 1e-9)

    def advance(self, tokens: int) -> None:
        """One more sample is finished, with this many response tokens."""
        self.finished += 1
        self.tokens += tokens
        rate = f"{self.tokens_per_second:,.0f} tokens/s"
        if self._console.live:
            self._console._progress.update(self._bar, advance=1, detail=rate)
        elif time.monotonic() - self._last_line > HEARTBEAT_SECONDS and self.finished < self.total:
            self._last_line = time.monotonic()
            self._console.note(f"  {self._label}: {self.finished}/{self.total} samples, {rate}")

    def close(self) -> None:
        self._console._progress.remove_task(self._bar)


class Console:
    """Use as a context manager around the loop; inside it, the ``opd`` loggers write above the bars."""

    def __init__(self, total_steps: int, start_step: int = 0, *, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        self.total_steps = total_steps
        self.rich, self.live = make_rich_console(stream)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=self.rich,
            transient=True,
            disable=not self.live,
        )
        self._steps = self._progress.add_task("steps", total=total_steps, completed=start_step, detail="")
        self._handler = self._make_log_handler(stream)
        self._before: tuple[bool, int] = (True, logging.NOTSET)

    def __enter__(self) -> Console:
        opd_logger = logging.getLogger("opd")
        self._before = (opd_logger.propagate, opd_logger.level)
        opd_logger.addHandler(self._handler)
        opd_logger.propagate = False  # the root handler would print the same line again, through the bars
        if opd_logger.level == logging.NOTSET:
            opd_logger.setLevel(logging.INFO)
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()
        opd_logger = logging.getLogger("opd")
        opd_logger.removeHandler(self._handler)
        opd_logger.propagate, level = self._before
        opd_logger.setLevel(level)

    @contextmanager
    def rollout(self, total: int, label: str = "rollout") -> Iterator[RolloutProgress]:
        """A bar over ``total`` samples; ``label="eval"`` for an evaluation."""
        progress = RolloutProgress(self, total, label)
        try:
            yield progress
        finally:
            progress.close()

    def phase(self, name: str) -> None:
        """What the step is doing now ("train", "sync", "save"), shown beside the bar."""
        self._progress.update(self._steps, detail=name)

    def step_line(self, metrics: Mapping[str, Any]) -> None:
        """One line for a finished step, and the bar moves to it."""
        self._progress.update(self._steps, completed=metrics["step"], detail="")
        self.note(format_step(metrics, self.total_steps))

    def note(self, text: str) -> None:
        self.rich.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        style = "yellow" if self.live else None
        self.rich.print(f"warning: {text}", style=style, markup=False, highlight=False, soft_wrap=True)

    def _make_log_handler(self, stream: TextIO) -> logging.Handler:
        if self.live:
            return RichHandler(console=self.rich, show_path=False, show_time=False, markup=False)
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_LowerLevelFormatter("%(levelname)s: %(message)s"))
        return handler


def make_rich_console(stream: TextIO) -> tuple[RichConsole, bool]:
    """(console, live). ``live`` only on a real terminal: environment variables that force colours do not count."""
    live = stream.isatty()
    console = (
        RichConsole(file=stream)
        if live
        else RichConsole(file=stream, force_terminal=False, color_system=None, width=PLAIN_WIDTH)
    )
    return console, live and not console.is_dumb_terminal


def format_step(metrics: Mapping[str, Any], total_steps: int) -> str:
    """``step 12/40  reward 0.531  reverse KL 0.0831  1.7 s (rollout 0.8, ...)  accuracy 55.1%``, as far as known."""
    parts = [f"step {metrics['step']:>{len(str(total_steps))}}/{total_steps}"]
    reward, reverse_kl = metrics.get("reward_mean"), metrics.get("opd_reverse_kl")
    losses = {"sft_loss": "answers", "distillation_divergence": "divergence", "policy_loss": "loss"}
    if reward is not None:
        parts.append(f"reward {reward:.3f}")
    if reverse_kl is not None:
        parts.append(f"reverse KL {reverse_kl:.4f}")
    for name, label in losses.items():  # the one that says most about this run
        if metrics.get(name) is not None and (reverse_kl is None or name != "policy_loss"):
            parts.append(f"{label} {metrics[name]:.4f}")
            break
    if metrics.get("response_length_mean") is not None:
        parts.append(f"length {metrics['response_length_mean']:.0f}")
    if metrics.get("time_step") is not None:
        times = [(name, metrics.get(f"time_{name}")) for name in PHASES]
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times if seconds is not None)
        parts.append(f"{metrics['time_step']:.1f} s" + (f" ({phases})" if phases else ""))
    if metrics.get("unscored_share"):
        parts.append(f"unscored {metrics['unscored_share']:.0%}")
    parts += [f"{name} {value:.1%}" for name, value in accuracies(metrics)]
    return "  ".join(parts)


def accuracies(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(label, 0 to 1) of each evaluation set in a row; one set is just called "accuracy"."""
    named = [
        (f"{key.removeprefix('eval/').removesuffix('_accuracy')} accuracy", value)
        for key, value in metrics.items()
        if key.startswith("eval/") and key.endswith("_accuracy") and value is not None
    ]
    if len(named) > 1:
        return named
    overall = metrics.get("eval_accuracy")
    return [("accuracy", overall)] if overall is not None else []


class _LowerLevelFormatter(logging.Formatter):
    """``warning: ...`` like ``Console.warn``, instead of ``WARNING: ...``."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace(record.levelname, record.levelname.lower(), 1)
