"""What data_sources.sh found: accuracy and answers kept after each round, as a Markdown table and a picture.

    python examples/experiments/data_sources.py outputs/experiments/data_sources --picture data_sources.png

Medians over the seeds whose rounds are complete, those of each seed in brackets. Problems kept are those with at least
one right answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from results import Run

from opd.report.metrics import read_metrics
from opd.report.summary import series

SOURCES = {"student": "the student", "speculative": "the mixture", "teacher": "the teacher"}
ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The rounds of one source with one seed.

    Args:
        accuracy: %, greedy, on the held-out problems: before, and after each round.
        steps: supervised steps done by then.
        answers: right answers kept in each round.
        problems: problems with a right answer in each round.
    """

    seed: int
    accuracy: tuple[float, ...]
    steps: tuple[int, ...]
    answers: tuple[int, ...]
    problems: tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of data_sources.sh")
    parser.add_argument("--picture", type=Path, help="PNG of accuracy by supervised steps")
    arguments = parser.parse_args()
    found = {label: complete_rounds(arguments.folder, source) for source, label in SOURCES.items()}
    if not all(found.values()):
        missing = ", ".join(label for label, rounds in found.items() if not rounds)
        parser.error(f"{arguments.folder} holds no {ROUNDS} complete rounds of {missing}")
    print(table(found))
    if arguments.picture:
        from pictures import draw_accuracy

        draw_accuracy(
            {"": {label: [as_run(label, each) for each in found[label]] for label in found}}, arguments.picture
        )


def complete_rounds(folder: Path, source: str) -> list[Rounds]:
    """By seed; a seed whose last round has not been trained is left out."""
    found = []
    for first in sorted(folder.glob(f"{source}-right-*")):
        folders = [first, *(first / f"round{number}" for number in range(2, ROUNDS + 1))]
        if all((each / "student" / "config.json").is_file() for each in folders):
            found.append(_rounds(int(first.name.rpartition("-")[2]), folders))
    return found


def _rounds(seed: int, folders: Sequence[Path]) -> Rounds:
    accuracy, steps, answers, problems = [], [0], [], []
    for folder in folders:
        measured = series(read_metrics(folder / "run" / "metrics.jsonl"), "eval_accuracy")
        if not accuracy:
            accuracy.append(100 * measured[0][1])
        accuracy.append(100 * measured[-1][1])
        steps.append(steps[-1] + measured[-1][0])
        rows = [json.loads(line)["row"] for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
        answers.append(len(rows))
        problems.append(len(set(rows)))
    return Rounds(
        seed=seed, accuracy=tuple(accuracy), steps=tuple(steps), answers=tuple(answers), problems=tuple(problems)
    )


def table(found: Mapping[str, Sequence[Rounds]]) -> str:
    """Markdown, a row for each source."""
    head = ["right answers of", "before"]
    for number in range(1, ROUNDS + 1):
        head += [f"answers kept, round {number}", "problems", f"after round {number}, %"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for label, seeds in found.items():
        cells = [label, _medians([each.accuracy[0] for each in seeds], digits=1)]
        for i in range(ROUNDS):
            cells += [_medians([each.answers[i] for each in seeds]), _medians([each.problems[i] for each in seeds])]
            cells.append(_medians([each.accuracy[i + 1] for each in seeds], digits=1))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _medians(values: Sequence[float], *, digits: int = 0) -> str:
    behind = f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(set(values)) > 1 else ""
    return f"{statistics.median(values):.{digits}f}{behind}"


def as_run(label: str, rounds: Rounds) -> Run:
    """For ``pictures.py``."""
    accuracy = dict(zip(rounds.steps, rounds.accuracy, strict=True))
    return Run(name=label, seed=rounds.seed, accuracy=accuracy, reward={}, reverse_kl={}, operations={})


if __name__ == "__main__":
    main()
