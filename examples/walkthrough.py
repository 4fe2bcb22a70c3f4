# %% [markdown]
"""One step of on-policy distillation, with its numbers: run it whole, or cell by cell in an editor that knows ``# %%``.

    python examples/walkthrough.py

It uses the framework's own functions (``opd.maths``) on the laptop task's student and teacher, without Megatron.
"""

# %% Two models that share a vocabulary: a student that forgot carries and borrows, and a teacher that did not
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opd.maths.advantages import group_relative  # noqa: E402
from opd.maths.divergence import divergence  # noqa: E402
from opd.maths.logprobs import token_logprobs  # noqa: E402
from opd.maths.penalty import subtract_reverse_kl  # noqa: E402
from opd.maths.policy_loss import policy_loss  # noqa: E402
from opd.rewards.rules import final_answer  # noqa: E402
from opd.torchvision_ops import define_missing_ops  # noqa: E402

define_missing_ops()  # of this environment's torchvision, which is built for CUDA
TASK = Path(__file__).parent / "on_policy_distillation" / "tiny_task"
console = Console()
torch.manual_seed(3)
tokenizer = AutoTokenizer.from_pretrained(TASK / "student")
student = AutoModelForCausalLM.from_pretrained(TASK / "student", dtype=torch.float32)
teacher = AutoModelForCausalLM.from_pretrained(TASK / "teacher", dtype=torch.float32)
prompt, label = "Tom has 30 coins, buys 2 more, gives 8 away, finds 3 more. How many?", "27"
prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]

# %% 1. The student writes: four answers to one prompt, a group
console.rule("1. The student writes")
console.print(prompt, highlight=False)
prompts = torch.tensor([prompt_ids] * 4)
written = student.generate(
    prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=56,
    pad_token_id=tokenizer.eos_token_id,
)[:, len(prompt_ids) :].tolist()  # fmt: skip
end = tokenizer.eos_token_id
responses = [ids[: ids.index(end) + 1] if end in ids else ids for ids in written]
texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]

# %% 2. The task rewards whole answers; GRPO compares each with its group
console.rule("2. Reward of the task -> advantage of the answer")
rewards_N = torch.tensor([final_answer(text, label) for text in texts])
advantages_N = group_relative(rewards_N, torch.zeros(4, dtype=torch.long))
table = Table("answer", "reward", "advantage = (reward - mean) / deviation")
for text, reward, advantage in zip(texts, rewards_N, advantages_N, strict=True):
    table.add_row(text, f"{reward:.0f}", f"{advantage:+.3f}")
console.print(table)
console.print("One number for every token of an answer: it does not say which token was wrong.", highlight=False)


# %% 3. Both models score every token of the first answer: the logits at position t - 1 predict token t
def response_logits(model: torch.nn.Module, response: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + response])).logits[0]
    return logits[len(prompt_ids) - 1 : -1]


response = responses[0]
response_T = torch.tensor(response)
student_TV, teacher_TV = response_logits(student, response), response_logits(teacher, response)
student_T, teacher_T = token_logprobs(student_TV, response_T), token_logprobs(teacher_TV, response_T)

# %% 4. The penalty: each token pays its own reverse KL
console.rule("3. The teacher scores every token -> advantage of the token")
own_T = advantages_N[0].expand(len(response))
total_T, reverse_kl_T = subtract_reverse_kl(own_T, student_T, teacher_T, torch.ones(len(response)), coef=1.0)
exact_T = divergence(student_TV, teacher_TV, kind="reverse_kl")
table = Table("token", "log p student", "log p teacher", "reverse KL", "exact KL here", "task", "task - reverse KL")
for t, token in enumerate(response):
    style = "bold red" if reverse_kl_T[t] > 1 else "bold blue" if reverse_kl_T[t] < -1 else None
    numbers = (student_T[t], teacher_T[t], reverse_kl_T[t], exact_T[t], own_T[t], total_T[t])
    table.add_row(repr(tokenizer.decode([token])), *[f"{value:+.3f}" for value in numbers], style=style)
console.print(table)
console.print(
    "Reverse KL = log p student - log p teacher of the token that was drawn: positive where the student was surer than "
    "the teacher. It is one sample of the exact KL(student || teacher) at that prefix, which knows every token.",
    highlight=False,
)
draws = torch.multinomial(student_TV.softmax(-1), 20_000, replacement=True)
sampled_T = (student_TV.log_softmax(-1) - teacher_TV.log_softmax(-1)).gather(1, draws).mean(1)
worst = int(exact_T.argmax())
shown = repr(tokenizer.decode([response[worst]]))
console.print(f"At {shown}, 20,000 draws give {sampled_T[worst]:.3f}, exactly {exact_T[worst]:.3f}", highlight=False)

# %% 5. The loss: a clipped policy gradient on these advantages
console.rule("4. The loss and its gradient")
logits = student(torch.tensor([prompt_ids + response])).logits[0][len(prompt_ids) - 1 : -1]
new_T = token_logprobs(logits, response_T)
loss_T, _ = policy_loss(new_T, student_T, total_T, kind="ppo", eps_low=0.2, eps_high=0.2)
(gradient_TV,) = torch.autograd.grad(loss_T.mean(), logits)
step_TV = logits.detach() - 3.0 * gradient_TV  # a step on the logits themselves, to see where it goes
table = Table("token", "advantage", "p before", "p after")
for t in sorted(range(len(response)), key=lambda t: -abs(float(total_T[t])))[:6]:
    before, after = logits[t].softmax(-1)[response[t]], step_TV[t].softmax(-1)[response[t]]
    table.add_row(repr(tokenizer.decode([response[t]])), f"{total_T[t]:+.3f}", f"{before:.3f}", f"{after:.3f}")
console.print(table)
console.print(
    f"loss {loss_T.mean():.4f}. The six tokens with the largest advantages: what pays a penalty gets less likely.",
    highlight=False,
)
