"""Data for a teacher that is no better than the student until it is told the answer.

    python examples/on_policy_distillation/tiny_task/make_privileged.py --output-dir outputs/objectives/privileged-data

``warmup.jsonl`` teaches the student's model to count correctly when the answer stands before the problem ("Answer: 23.
Tom has 18 apples, ..."), and to go on slipping when it does not: half of the rows each. One set of weights is then the
student (no hint) and its privileged teacher (hint).

``eval-hinted.jsonl`` and ``eval-misled.jsonl`` are the held-out problems behind their answer, and behind another
number; the task's own ``eval.jsonl`` is the case without a hint. No held-out problem is in the warm-up.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from problems import LARGEST_TOTAL, Problem, SloppyCalculator, distinct_problems, make_problem

TEMPLATE = "Answer: {label}. {prompt}"  # of --opd-teacher-prompt-template
HELD_OUT_PROBLEMS, HELD_OUT_SEED = 256, 999  # those of make_tiny_task.py
SEED = 2024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--rows", type=int, default=16384, help="answers to learn from")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    held_out = distinct_problems(HELD_OUT_PROBLEMS, seed=HELD_OUT_SEED)
    rng = random.Random(SEED)
    write_jsonl(arguments.output_dir / "warmup.jsonl", warmup_rows(arguments.rows, rng, held_out))
    for name, shown in (("hinted", right_number), ("misled", wrong_number)):
        rows = [{"prompt": behind(shown(p, rng), p), "label": str(p.answer)} for p in held_out]
        write_jsonl(arguments.output_dir / f"eval-{name}.jsonl", rows)


def warmup_rows(count: int, rng: random.Random, held_out: list[Problem]) -> list[dict[str, str]]:
    """``count`` rows of a prompt and its ``response``: correct chains behind an answer, sloppy ones without."""
    excluded = {problem.prompt for problem in held_out}
    slips = SloppyCalculator(rng=rng)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        problem = make_problem(rng)
        if problem.prompt in excluded:
            continue
        if rng.random() < 0.5:
            rows.append({"prompt": behind(problem.answer, problem), "response": problem.chain()})
        else:
            rows.append({"prompt": problem.prompt, "response": problem.chain(slips)})
    return rows


def behind(label: int, problem: Problem) -> str:
    return TEMPLATE.format(label=label, prompt=problem.prompt)


def right_number(problem: Problem, rng: random.Random) -> int:
    return problem.answer


def wrong_number(problem: Problem, rng: random.Random) -> int:
    while (label := rng.randint(0, LARGEST_TOTAL)) == problem.answer:
        pass
    return label


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
