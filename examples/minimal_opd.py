"""On-policy distillation on transformers alone: the whole algorithm on one page.

    python examples/minimal_opd.py [STEPS]

trains the laptop task's student under its teacher and prints accuracy and reverse KL: some minutes on one core. Same
losses, gradients and penalty as the framework with its defaults (``--advantage-estimator grpo --use-opd``); what the
framework adds is size, speed and everything that can go wrong.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from opd.torchvision_ops import define_missing_ops  # noqa: E402

define_missing_ops()  # of this environment's torchvision, which is built for CUDA; does nothing where they are there
TASK = Path(__file__).parent / "on_policy_distillation" / "tiny_task"
PROMPTS, ANSWERS, STEPS, LONGEST = 16, 8, 20, 56  # per step: prompts, answers to each; tokens per answer at most
LEARNING_RATE, KL_COEF, CLIP = 3e-4, 1.0, 0.2


def main(steps: int = STEPS) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TASK / "student")
    student = AutoModelForCausalLM.from_pretrained(TASK / "student", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(TASK / "teacher", dtype=torch.float32).eval()
    problems = [json.loads(line) for line in (TASK / "train.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (TASK / "eval.jsonl").read_text().splitlines()][:128]
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    print(f"accuracy {accuracy(student, tokenizer, held_out):.1%}")
    for step in range(1, steps + 1):
        rows = [problem for problem in random.Random(step).sample(problems, PROMPTS) for _ in range(ANSWERS)]
        prompts = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
        responses = generate(student, prompts, tokenizer.eos_token_id, temperature=1.0)  # on-policy: the student's own
        rewards = torch.tensor([reward(tokenizer, ids, row) for ids, row in zip(responses, rows, strict=True)])
        loss, reverse_kl = opd_loss(student, teacher, prompts, responses, rewards, group_size=ANSWERS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        print(f"step {step}  reward {rewards.mean():.3f}  reverse KL {reverse_kl:.4f}")
    print(f"accuracy {accuracy(student, tokenizer, held_out):.1%}")


def opd_loss(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    prompts: list[list[int]],
    responses: list[list[int]],
    rewards_N: torch.Tensor,
    *,
    group_size: int,
) -> tuple[torch.Tensor, float]:
    """(loss to minimise, mean reverse KL in nats per token). Answers to the same prompt follow each other."""
    # 1. Log-probs of every response token: the student's with gradient, the teacher's without.
    student_logprobs = token_logprobs(student, prompts, responses)
    with torch.no_grad():
        teacher_logprobs = token_logprobs(teacher, prompts, responses)
    # 2. GRPO: an answer's advantage is its reward relative to the other answers to the same prompt.
    groups = rewards_N.view(-1, group_size)
    relative = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    losses, penalties = [], []
    for new, theirs, advantage in zip(student_logprobs, teacher_logprobs, relative.flatten(), strict=True):
        # 3. On-policy distillation: every token pays its own reverse KL. As a number, without gradient: its gradient
        #    would not depend on the teacher, whereas the policy gradient below is that of KL(student || teacher).
        old = new.detach()
        reverse_kl = old - theirs
        advantages = advantage - KL_COEF * reverse_kl
        # 4. The clipped policy gradient. At the first update the ratio is 1, and its gradient that of log-prob.
        ratio = (new - old).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        losses.append(loss.mean())
        penalties.append(reverse_kl)
    return torch.stack(losses).mean(), float(torch.cat(penalties).mean())


def token_logprobs(model: torch.nn.Module, prompts: list[list[int]], responses: list[list[int]]) -> list[torch.Tensor]:
    """For each sample the log-probs [T] of its response tokens: logits at position t - 1 predict token t."""
    sequences = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    logprobs = model(padded).logits[:, :-1].log_softmax(-1)  # padding is on the right: causal attention never sees it
    chosen = logprobs.gather(-1, padded[:, 1:, None]).squeeze(-1)
    ends = [(len(prompt), len(prompt) + len(response)) for prompt, response in zip(prompts, responses, strict=True)]
    return [row[start - 1 : end - 1] for row, (start, end) in zip(chosen, ends, strict=True)]


@torch.no_grad()
def generate(model: torch.nn.Module, prompts: list[list[int]], end: int, *, temperature: float) -> list[list[int]]:
    """One answer to each prompt, its end token included; temperature 0 takes the likeliest token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    written = model.generate(
        ids, attention_mask=mask, max_new_tokens=LONGEST, do_sample=temperature > 0, temperature=temperature or None,
        top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=end,
    )[:, width:].tolist()  # fmt: skip
    return [row[: row.index(end) + 1] if end in row else row for row in written]


def reward(tokenizer: AutoTokenizer, response: list[int], row: dict[str, str]) -> float:
    """1 if what follows the last # is the label."""
    return float(tokenizer.decode(response, skip_special_tokens=True).rpartition("#")[2].strip() == row["label"])


def accuracy(model: torch.nn.Module, tokenizer: AutoTokenizer, rows: list[dict[str, str]]) -> float:
    answers = generate(
        model,
        [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows],
        tokenizer.eos_token_id,
        temperature=0,
    )
    return sum(reward(tokenizer, ids, row) for ids, row in zip(answers, rows, strict=True)) / len(rows)


if __name__ == "__main__":
    print(__doc__) if {"-h", "--help"} & set(sys.argv) else main(*map(int, sys.argv[1:]))
