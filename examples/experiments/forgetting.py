"""What forgetting.sh found: a Markdown table of both tasks' accuracies, and a picture of them step by step.

    python examples/experiments/forgetting.py outputs/experiments/forgetting --picture forgetting.png

A way is one run or several, one after the other, and its steps are counted through. A seed that lacks one of them is
left out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from results import Run

from opd.report.metrics import read_metrics
from opd.report.summary import series

TASKS = ("stories", "prices")
# What it is called here -> its runs, by forgetting.sh's names.
PRICES_ONLY = "prices learned"
WAYS = {
    PRICES_ONLY: ("prices",),
    "then reverse KL": ("prices", "reverse_kl"),
    "then two teachers, routed": ("prices", "routed"),
    "then penalty + prices": ("prices", "mixed"),
    "three short rounds": tuple(f"round{i}_{part}" for i in (1, 2, 3) for part in TASKS[::-1]),
    "rehearsal": ("rehearsal",),
}


@dataclass(frozen=True, kw_only=True)
class Course:
    """One way with one seed.

    Args:
        accuracy: task -> %, greedy, on its held-out problems, by step of the whole way.
        ends: run -> its last step, counted through.
    """

    seed: int
    accuracy: Mapping[str, Mapping[int, float]]
    ends: Mapping[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder of the runs NAME-SEED")
    parser.add_argument("--picture", type=Path, help="PNG of both accuracies by step")
    arguments = parser.parse_args()
    ways = {label: found for label, runs in WAYS.items() if (found := courses(arguments.folder, runs))}
    if not ways:
        parser.error(f"{arguments.folder} holds all runs of no way, for no seed")
    print(table(ways))
    if arguments.picture:
        drawn = {label: found for label, found in ways.items() if label != PRICES_ONLY}  # the others begin with it
        if not drawn:
            parser.error(f"--picture={arguments.picture}: {arguments.folder} holds no complete way to draw yet")
        draw(drawn, arguments.picture)


def courses(folder: Path, runs: Sequence[str]) -> list[Course]:
    """By seed."""
    seeds = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob(f"{runs[-1]}-[0-9]*"))
    found = (_course(folder, runs, seed) for seed in seeds)
    return [course for course in found if course is not None]


def _course(folder: Path, runs: Sequence[str], seed: int) -> Course | None:
    accuracy: dict[str, dict[int, float]] = {task: {} for task in TASKS}
    ends: dict[str, int] = {}
    done = 0
    for name in runs:
        path = folder / f"{name}-{seed}" / "metrics.jsonl"
        if not path.exists():
            return None
        rows = read_metrics(path)
        for task in TASKS:
            accuracy[task] |= {done + step: 100 * value for step, value in series(rows, f"eval/{task}_accuracy")}
        done += rows[-1]["step"]
        ends[name] = done
    measured = all(end in accuracy[TASKS[0]] for end in ends.values())  # at its last step, so it is complete
    return Course(seed=seed, accuracy=accuracy, ends=ends) if measured else None


def table(ways: Mapping[str, Sequence[Course]]) -> str:
    """Markdown, a row for each run's end that is not in a row before; behind a median stand the seeds' values."""
    lines = ["| way | seeds | after step | stories, % | prices, % |", "|" + "---|" * 5]
    shown: set[str] = set()
    for label, found in ways.items():
        for run, end in found[0].ends.items():
            if run not in shown:
                seeds = ", ".join(str(course.seed) for course in found)
                cells = [_medians([course.accuracy[task][end] for course in found]) for task in TASKS]
                lines.append("| " + " | ".join([label, seeds, str(end), *cells]) + " |")
                shown.add(run)
    return "\n".join(lines)


def _medians(values: Sequence[float]) -> str:
    behind = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(set(values)) > 1 else ""
    return f"{statistics.median(values):.1f}{behind}"


def draw(ways: Mapping[str, Sequence[Course]], path: Path) -> None:
    from pictures import draw_accuracy

    panels = {}
    for title, first in (("prices, then ...", True), ("other ways", False)):
        for task in TASKS:
            shown = {label: found for label, found in ways.items() if (WAYS[label][0] == "prices") == first}
            panels[f"{task}: {title}"] = {
                label.removeprefix("then "): [_as_run(label, course, task) for course in found]
                for label, found in shown.items()
            }
    draw_accuracy(panels, path, unit="right, greedy, %")


def _as_run(label: str, course: Course, task: str) -> Run:
    accuracy = dict(course.accuracy[task])
    return Run(name=label, seed=course.seed, accuracy=accuracy, reward={}, reverse_kl={}, operations={})


if __name__ == "__main__":
    main()
