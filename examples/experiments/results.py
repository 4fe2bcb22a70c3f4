"""What an experiment found: a Markdown table of medians over seeds, and a picture of the curves.

    python examples/experiments/results.py outputs/experiments/steps_to_target --picture steps_to_target.png

Reads the runs NAME-SEED in the folders. Accuracy is greedy, on the held-out problems; steps to a level lie on straight
lines between evaluations, and a seed that never gets there counts as later than all others. Operations are those of the
run's own cost account, without those of a teacher that only measures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from opd.report.metrics import read_metrics
from opd.report.summary import series

SHOWN_STEPS = (10, 20, 30)
LEVELS = (70.0, 80.0)  # % right
WINDOW = 5  # steps in the averages of noisy values
NEVER = math.inf


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Args:
        accuracy: %, greedy, on the held-out problems, by step; the first evaluation is step 0.
        reward: share of right answers among the samples of a step, at temperature 1.
        reverse_kl: to the run's own teacher, nats per token, by step.
        operations: floating-point operations of each step.
    """

    name: str
    seed: int
    accuracy: dict[int, float]
    reward: dict[int, float]
    reverse_kl: dict[int, float]
    operations: dict[int, float]

    @property
    def last_step(self) -> int:
        return max(self.accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs NAME-SEED")
    parser.add_argument("--names", nargs="+", help="these runs alone, in this order")
    parser.add_argument(
        "--baseline", metavar="NAME", help="add its operations to the last level over those of each run"
    )
    parser.add_argument("--last-step", type=int, help="leave out later evaluations, where runs differ in length")
    parser.add_argument("--picture", type=Path, help="PNG of accuracy by step")
    arguments = parser.parse_args()
    runs = [cut(run, arguments.last_step) for folder in arguments.folders for run in runs_in(folder)]
    names = arguments.names or list(dict.fromkeys(run.name for run in runs))
    groups = {name.replace("_", " "): [run for run in runs if run.name == name] for name in names}
    if not runs or not all(groups.values()):
        missing = [name for name, of_name in groups.items() if not of_name] or ["any name"]
        where = ", ".join(map(str, arguments.folders))
        parser.error(f"no run NAME-SEED with an evaluation in {where} for {', '.join(missing)}")
    print(table(groups, baseline=arguments.baseline and arguments.baseline.replace("_", " ")))
    if arguments.picture:
        from pictures import draw_accuracy

        draw_accuracy({"": groups}, arguments.picture)


def runs_in(folder: Path) -> list[Run]:
    """Those with an evaluation, by name, then seed."""
    found = []
    for path in sorted(folder.glob("*-*/metrics.jsonl")):
        name, _, seed = path.parent.name.rpartition("-")
        if seed.isdigit():
            run = run_of(name, int(seed), read_metrics(path), teaches=has_acting_teacher(path.with_name("run.json")))
            if run.accuracy:
                found.append(run)
    return found


def run_of(name: str, seed: int, rows: Sequence[Mapping[str, Any]], *, teaches: bool = True) -> Run:
    left_out = () if teaches else ("flops/teacher",)
    return Run(
        name=name,
        seed=seed,
        accuracy={step: 100 * value for step, value in series(rows, "eval_accuracy")},
        reward=dict(series(rows, "reward_mean")),
        reverse_kl=dict(series(rows, "opd_reverse_kl")),
        operations={
            row["step"]: sum(v for k, v in row.items() if k.startswith("flops/") and v and k not in left_out)
            for row in rows
        },
    )


def cut(run: Run, last_step: int | None) -> Run:
    """The run without the evaluations after ``last_step``; None: all of it."""
    kept = {step: value for step, value in run.accuracy.items() if last_step is None or step <= last_step}
    return replace(run, accuracy=kept)


def has_acting_teacher(record: Path) -> bool:
    """Whether the teacher's scores change the weights: not so with a penalty of weight 0."""
    flags = json.loads(record.read_text(encoding="utf-8"))["flags"] if record.exists() else {}
    return "distillation_type" in flags or flags.get("opd_kl_coef", 1.0) != 0.0


def table(groups: Mapping[str, Sequence[Run]], *, baseline: str | None = None) -> str:
    """Markdown, a row for each label; behind a median stand the values of the seeds."""
    head = ["run", *(f"step {step}" for step in SHOWN_STEPS), "last step"]
    head += [f"steps to {level:.0f}%" for level in LEVELS]
    head += [
        f"operations to {LEVELS[-1]:.0f}%, TFLOP",
        "right at T = 1, last steps, %",
        "reverse KL, first and last steps",
    ]
    reference = _operations_to_level(groups[baseline]) if baseline else NEVER
    if baseline:
        head.append(f"operations of {baseline} over these")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for label, runs in groups.items():
        cells = [label, *_cells(runs)]
        if baseline:
            own = _operations_to_level(runs)
            cells.append("-" if math.inf in (own, reference) else f"{reference / own:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(runs: Sequence[Run]) -> list[str]:
    last = min(run.last_step for run in runs)
    return [
        *(_medians([run.accuracy[step] for run in runs if step in run.accuracy], each=False) for step in SHOWN_STEPS),
        f"{last}: {_medians([run.accuracy[last] for run in runs])}",
        *(_medians([steps_to(run.accuracy, level) for run in runs], digits=0, last=last) for level in LEVELS),
        _medians([operations_to(run, LEVELS[-1]) / 1e12 for run in runs], digits=2, each=False, last=0),
        _medians([100 * mean(run.reward, last - WINDOW + 1, last) for run in runs], digits=0, each=False),
        " → ".join(
            _medians([mean(run.reverse_kl, first, first + WINDOW - 1) for run in runs], digits=3, each=False)
            for first in (1, last - WINDOW + 1)
        ),
    ]


def _medians(values: Sequence[float], *, digits: int = 1, each: bool = True, last: int = 0) -> str:
    """The median, and each seed's value; a value that was not reached is "above" the last step."""

    def text(value: float) -> str:
        return f"{value:.{digits}f}" if value != NEVER else f"above {last}" if last else "-"

    if not values or any(map(math.isnan, values)):
        return "-"
    behind = f" ({', '.join(map(text, values))})" if each and len(set(values)) > 1 else ""
    return text(statistics.median(values)) + behind


def steps_to(accuracy: Mapping[int, float], level: float) -> float:
    """The step at which ``level`` is first reached, on straight lines between evaluations; ``NEVER`` if it is not."""
    points = sorted(accuracy.items())
    if points and points[0][1] >= level:
        return points[0][0]
    for (step, value), (next_step, next_value) in pairwise(points):
        if value < level <= next_value:
            return step + (next_step - step) * (level - value) / (next_value - value)
    return NEVER


def operations_to(run: Run, level: float) -> float:
    """Operations of all steps up to ``steps_to(level)``, of the last one its share; ``NEVER`` where unknown."""
    reached = steps_to(run.accuracy, level)
    if reached == NEVER or not any(run.operations.values()):  # runs of old versions have no account
        return NEVER
    return sum(value * min(1.0, max(0.0, reached - (step - 1))) for step, value in run.operations.items())


def _operations_to_level(runs: Sequence[Run]) -> float:
    return statistics.median(operations_to(run, LEVELS[-1]) for run in runs)


def mean(values: Mapping[int, float], first: int, last: int) -> float:
    """Over the steps from ``first`` to ``last``, both included, that have a value; NaN without any."""
    chosen = [value for step, value in values.items() if first <= step <= last]
    return statistics.fmean(chosen) if chosen else math.nan


def smoothed(values: Mapping[int, float]) -> dict[int, float]:
    """The centred average over ``WINDOW`` steps, fewer at the ends."""
    half = WINDOW // 2
    return {step: mean(values, step - half, step + half) for step in values}


def median_curve(runs: Sequence[Run], values_of: Callable[[Run], Mapping[int, float]]) -> list[tuple[int, float]]:
    """(step, median over seeds) where every seed has a value."""
    values = [values_of(run) for run in runs]
    steps = sorted(set.intersection(*(set(each) for each in values))) if values else []
    return [(step, statistics.median(each[step] for each in values)) for step in steps]


if __name__ == "__main__":
    main()
