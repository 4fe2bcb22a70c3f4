"""The pair that the examples sample from: a student that slips, and a teacher that reads the answer in its prompt.

    python examples/optimal_sampling/tiny_pair.py

The task is ``examples/on_policy_distillation/tiny_task`` (its README has the problems and the student). The teacher
shipped there has never seen an answer in a prompt; 40 supervised steps (about 20 seconds, once) teach it the three
forms below, and the result is kept in ``outputs/optimal_sampling/teacher``. Prints that folder.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: more threads wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
TASK = ROOT / "examples" / "on_policy_distillation" / "tiny_task"
sys.path[:0] = [str(ROOT), str(TASK)]
if {"-h", "--help"} & set(
    sys.argv[1:]
):  # of the script that imports this, which takes no flags; before torch is imported
    sys.stdout.write(sys.modules["__main__"].__doc__ or "")
    raise SystemExit(0)

STUDENT = TASK / "student"
TEACHER = ROOT / "outputs" / "optimal_sampling" / "teacher"
TEACHER_FORMS = ("Answer: {label}. {prompt}", "# {label}. {prompt}", "{label}. {prompt}")
MAX_TOKENS = 56  # the longest correct answer has 55 tokens
STEPS, BATCH, SEED = 40, 64, 7


def teacher_folder() -> Path:
    """The teacher's folder, made on first use."""
    if not (TEACHER / "config.json").is_file():
        _make_teacher()
    return TEACHER


def problems(count: int) -> list[dict[str, str]]:
    """``count`` of the training problems: ``prompt`` and ``label``."""
    with (TASK / "train.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def share_right(texts: Sequence[str], rows: Sequence[dict[str, str]]) -> float:
    """Share of the answers whose number after ``#`` is the label."""
    from opd.rewards.rules import final_answer

    return sum(final_answer(text, row["label"]) for text, row in zip(texts, rows, strict=True)) / len(rows)


def _make_teacher() -> None:
    import tiny_model  # of the tiny task; defines what transformers needs to import
    import torch
    from make_tiny_task import warm_up_then_linear
    from problems import distinct_problems, make_problem
    from transformers import Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from opd.data.tokenizer import load_tokenizer

    disable_progress_bar()
    print(f"teaching the teacher to read answers, once ({STEPS} steps) ...", file=sys.stderr)
    held_out = {problem.prompt for problem in distinct_problems(256, seed=999)}  # those of eval.jsonl
    rng = random.Random(SEED)

    def next_pair() -> tuple[str, str]:
        while (problem := make_problem(rng)).prompt in held_out:
            pass
        form = rng.choice(TEACHER_FORMS)
        return form.format(prompt=problem.prompt, label=problem.answer), problem.chain()

    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(TASK / "teacher")
    model = Qwen3ForCausalLM.from_pretrained(TASK / "teacher", dtype=torch.float32)
    schedule = warm_up_then_linear(10, STEPS)
    for _ in tiny_model.train(
        model, tokenizer, next_pair, steps=STEPS, batch_size=BATCH, peak_lr=1e-3, lr_share=schedule, weight_decay=0.01
    ):
        pass
    model.save_pretrained(TEACHER)
    tokenizer.save_pretrained(TEACHER)


if __name__ == "__main__":
    print(teacher_folder())
