"""A teacher of the laptop task of another size or strength: fresh weights trained on correct chains.

    python examples/experiments/make_teacher.py --width 64 --steps 450 --output-dir outputs/experiments/teachers/small

As ``make_tiny_task.py`` makes the shipped teacher (width 128, 700 steps), with other first weights. Prints the share of
the held-out problems that the teacher itself gets right. The same flags give the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

TASK = Path(__file__).resolve().parents[1] / "on_policy_distillation" / "tiny_task"
sys.path.append(str(TASK))

from make_tiny_task import (  # noqa: E402
    EVAL_PROBLEMS,
    EVAL_SEED,
    correct_pairs,
    run_training,
    save_and_measure,
    warm_up_then_cosine,
)
from problems import distinct_problems  # noqa: E402
from tiny_model import HEAD_WIDTH, MAX_POSITIONS, new_model  # noqa: E402
from tiny_tokenizer import make_tokenizer  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

PEAK_LR, WEIGHT_DECAY = 3e-3, 0.01  # those of the shipped teacher
SEED = 1  # the shipped teacher, which the student was made from, is of seed 0


def main() -> None:
    arguments = _arguments()
    disable_progress_bar()
    held_out = distinct_problems(EVAL_PROBLEMS, seed=EVAL_SEED)
    tokenizer = make_tokenizer(max_length=MAX_POSITIONS)
    model = new_model(tokenizer, seed=SEED, width=arguments.width)
    run_training(
        model,
        tokenizer,
        correct_pairs(frozenset(problem.prompt for problem in held_out)),
        label=arguments.output_dir.name,
        steps=arguments.steps,
        peak_lr=PEAK_LR,
        lr_share=warm_up_then_cosine(arguments.steps // 7, arguments.steps),
        weight_decay=WEIGHT_DECAY,
    )
    save_and_measure(arguments.output_dir, model, tokenizer, held_out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128, help=f"hidden size, a multiple of {HEAD_WIDTH}")
    parser.add_argument("--steps", type=int, default=450, help="steps of 64 chains")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the teacher")
    arguments = parser.parse_args()
    if arguments.width < HEAD_WIDTH or arguments.width % HEAD_WIDTH:
        parser.error(f"--width={arguments.width} must be a multiple of {HEAD_WIDTH}, the width of an attention head")
    if arguments.steps < 1:
        parser.error(f"--steps={arguments.steps} must be 1 or more")
    return arguments


if __name__ == "__main__":
    main()
