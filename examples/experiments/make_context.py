"""Data for a teacher that is no better than the student until it reads a worked solution.

    python examples/experiments/make_context.py --output-dir outputs/experiments/teachers/context-data

The context stands in front of the problem, "Answer: 18-4=14; 14-6=8; ...; # 23. Tom has 18 apples, ...": a right
solution, or one of the sloppy writer with a wrong end. Unlike the final number alone, a model that cannot calculate can
use it: it only has to copy.

``warmup.jsonl`` teaches the student's model to do so. In half of the rows the answer follows the solution in front of
it, whose writer slips about every second time, so that nothing but the context tells what comes next; in the other half
there is no context, and the writer is the student's own. ``train.jsonl`` holds the task's problems with both contexts,
as the fields ``right`` and ``wrong``; ``eval-right.jsonl`` and ``eval-wrong.jsonl`` are the held-out problems behind
them. No held-out problem is in the warm-up.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

TASK = Path(__file__).resolve().parents[1] / "on_policy_distillation" / "tiny_task"
sys.path.append(str(TASK))

from make_privileged import HELD_OUT_PROBLEMS, HELD_OUT_SEED, write_jsonl  # noqa: E402
from problems import Problem, SloppyCalculator, distinct_problems, make_problem  # noqa: E402

TRAIN_PROBLEMS, TRAIN_SEED = 4096, 77  # those of make_tiny_task.py
SEED = 2025


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the four files")
    parser.add_argument("--rows", type=int, default=16384, help="answers to learn from")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    held_out = distinct_problems(HELD_OUT_PROBLEMS, seed=HELD_OUT_SEED)
    excluded = frozenset(problem.prompt for problem in held_out)
    rng = random.Random(SEED)
    write_jsonl(arguments.output_dir / "warmup.jsonl", warmup_rows(arguments.rows, rng, excluded))
    training = distinct_problems(TRAIN_PROBLEMS, seed=TRAIN_SEED, exclude=excluded)
    write_jsonl(arguments.output_dir / "train.jsonl", [row_with_contexts(problem, rng) for problem in training])
    rows = [row_with_contexts(problem, rng) for problem in held_out]
    for name in ("right", "wrong"):
        behind = [{"prompt": f"{row[name]} {row['prompt']}", "label": row["label"]} for row in rows]
        write_jsonl(arguments.output_dir / f"eval-{name}.jsonl", behind)


def warmup_rows(count: int, rng: random.Random, excluded: frozenset[str]) -> list[dict[str, str]]:
    """``count`` rows of a prompt and its ``response``."""
    student = SloppyCalculator(rng=rng)
    undecided = SloppyCalculator(rng=rng, carry=0.5, borrow=0.5, large_product=0.5, other=0.2)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        problem = make_problem(rng)
        if problem.prompt in excluded:
            continue
        if rng.random() < 0.5:
            chain = problem.chain(undecided)
            rows.append({"prompt": f"{context(chain)} {problem.prompt}", "response": chain})
        else:
            rows.append({"prompt": problem.prompt, "response": problem.chain(student)})
    return rows


def row_with_contexts(problem: Problem, rng: random.Random) -> dict[str, str]:
    wrong = problem.chain(SloppyCalculator(rng=rng))
    while wrong.endswith(f"# {problem.answer}"):  # some problems need no carry: any step may slip until one does
        wrong = problem.chain(SloppyCalculator(rng=rng, other=0.5))
    return {
        "prompt": problem.prompt,
        "label": str(problem.answer),
        "right": context(problem.chain()),
        "wrong": context(wrong),
    }


def context(chain: str) -> str:
    return f"Answer: {chain}."


if __name__ == "__main__":
    main()
