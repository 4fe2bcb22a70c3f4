"""Makes the tiny task from nothing: prompts, tokenizer, a teacher that can count, and a student that slips.

    python examples/on_policy_distillation/tiny_task/make_tiny_task.py --output-dir outputs/tiny_task

The shipped files beside this script came from its defaults. The same machine, versions and --threads give the same
files; elsewhere the last bits of the weights, and with them a few answers in 256, may differ.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from problems import Problem, SloppyCalculator, distinct_problems, make_problem
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tiny_model import MAX_POSITIONS, accuracy, new_model, train
from tiny_tokenizer import make_tokenizer
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

TRAIN_PROBLEMS = 4096
EVAL_PROBLEMS = 256
EVAL_SEED, TRAIN_SEED, TEACHER_SEED, STUDENT_SEED = 999, 77, 123, 31
BATCH_SIZE = 64

console = Console()


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()  # of saving and loading; ours shows the training
    out: Path = arguments.output_dir
    out.mkdir(parents=True, exist_ok=True)

    held_out = distinct_problems(EVAL_PROBLEMS, seed=EVAL_SEED)
    held_out_prompts = frozenset(problem.prompt for problem in held_out)
    write_jsonl(out / "eval.jsonl", held_out)
    write_jsonl(out / "train.jsonl", distinct_problems(TRAIN_PROBLEMS, seed=TRAIN_SEED, exclude=held_out_prompts))
    tokenizer = make_tokenizer(max_length=MAX_POSITIONS)

    model = new_model(tokenizer, seed=0)
    run_training(
        model,
        tokenizer,
        correct_pairs(held_out_prompts),
        label="teacher",
        steps=arguments.teacher_steps,
        peak_lr=3e-3,
        lr_share=warm_up_then_cosine(100, arguments.teacher_steps),
        weight_decay=0.01,
    )
    save_and_measure(out / "teacher", model, tokenizer, held_out)

    run_training(
        model,
        tokenizer,
        sloppy_pairs(held_out_prompts),
        label="student",
        steps=arguments.student_steps,
        peak_lr=1e-3,
        lr_share=warm_up_then_linear(20, arguments.student_steps),
        weight_decay=0.0,
    )
    save_and_measure(out / "student", model, tokenizer, held_out)

    size = sum(path.stat().st_size for path in asset_files(out))
    console.print(f"{out}: {size / 1e6:.2f} MB, made in {time.monotonic() - started:.0f} s")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the data and the two models")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--teacher-steps", type=int, default=700, help="steps on correct chains, from fresh weights")
    parser.add_argument("--student-steps", type=int, default=90, help="steps on sloppy chains, from the teacher")
    return parser.parse_args()


def write_jsonl(path: Path, problems: list[Problem]) -> None:
    rows = [json.dumps({"prompt": problem.prompt, "label": str(problem.answer)}) for problem in problems]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def correct_pairs(held_out_prompts: frozenset[str]) -> Callable[[], tuple[str, str]]:
    rng = random.Random(TEACHER_SEED)

    def next_pair() -> tuple[str, str]:
        problem = unseen_problem(rng, held_out_prompts)
        return problem.prompt, problem.chain()

    return next_pair


def sloppy_pairs(held_out_prompts: frozenset[str]) -> Callable[[], tuple[str, str]]:
    rng = random.Random(STUDENT_SEED)
    calculate = SloppyCalculator(rng=rng)

    def next_pair() -> tuple[str, str]:
        problem = unseen_problem(rng, held_out_prompts)
        return problem.prompt, problem.chain(calculate)

    return next_pair


def unseen_problem(rng: random.Random, held_out_prompts: frozenset[str]) -> Problem:
    while (problem := make_problem(rng)).prompt in held_out_prompts:
        pass
    return problem


def warm_up_then_cosine(warm_up: int, steps: int) -> Callable[[int], float]:
    """Down to 5% of the peak."""
    return lambda step: min(1, step / warm_up) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def warm_up_then_linear(warm_up: int, steps: int) -> Callable[[int], float]:
    """Down to 10% of the peak."""
    return lambda step: min(1, step / warm_up) * (1 - 0.9 * step / steps)


def run_training(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    next_pair: Callable[[], tuple[str, str]],
    *,
    label: str,
    steps: int,
    peak_lr: float,
    lr_share: Callable[[int], float],
    weight_decay: float,
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=steps)
        for step, loss in train(
            model,
            tokenizer,
            next_pair,
            steps=steps,
            batch_size=BATCH_SIZE,
            peak_lr=peak_lr,
            lr_share=lr_share,
            weight_decay=weight_decay,
        ):
            progress.update(task, completed=step, description=f"{label}: loss {loss:.4f}")


def save_and_measure(
    folder: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, held_out: list[Problem]
) -> None:
    """Stores bf16 weights (half the bytes to ship) and measures what was stored, computed in fp32 as runs do."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.load_state_dict(Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    model.to(torch.float32)
    greedy = accuracy(model, tokenizer, held_out, temperature=0.0)
    sampled = sum(accuracy(model, tokenizer, held_out, temperature=1.0, seed=seed) for seed in range(4)) / 4
    console.print(f"{folder.name}: {greedy:.1%} greedy, {sampled:.1%} at temperature 1")


def asset_files(out: Path) -> list[Path]:
    models = [path for name in ("teacher", "student") for path in (out / name).iterdir()]
    return [out / "train.jsonl", out / "eval.jsonl", *models]


if __name__ == "__main__":
    main()
