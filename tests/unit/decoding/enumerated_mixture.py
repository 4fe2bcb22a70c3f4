"""The exact distribution of short answers from a mixture over a tiny vocabulary, and tests of frequencies."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache

import torch
from scipy import stats

from opd.torchvision_ops import define_missing_ops
from opd.types import GenerationResult

define_missing_ops()
import transformers  # noqa: E402

VOCABULARY = 5
LENGTH = 3  # response tokens
TEMPERATURE = 0.3
STUDENT_PROMPT, TEACHER_PROMPT = (2, 0, 3), (2, 0, 3, 1, 4, 4)
ANSWERS = list(itertools.product(range(VOCABULARY), repeat=LENGTH))


@cache
def make_model(seed: int, hidden_size: int = 16) -> torch.nn.Module:
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.4, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.Qwen3ForCausalLM(config).eval()


def pair(seed: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(student, teacher), different in weights and size."""
    return make_model(2 * seed), make_model(2 * seed + 1, 24)


def step_log_probs(model: torch.nn.Module, prompt: tuple[int, ...]) -> torch.Tensor:
    """[answers, LENGTH, VOCABULARY] in float64: what may follow each prefix of every answer."""
    ids = torch.tensor([[*prompt, *answer] for answer in ANSWERS])
    with torch.no_grad():
        logits = model(ids).logits[:, len(prompt) - 1 : -1].double()
    return (logits / TEMPERATURE).log_softmax(-1)


def mixed(log_s: torch.Tensor, log_t: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(log q, a) at each position by bisection of the defining equation."""
    low = torch.zeros(log_s.shape[:-1], dtype=torch.float64)
    high = torch.ones_like(low)
    ratio = log_t - log_s

    def log_norm(a: torch.Tensor) -> torch.Tensor:
        return (log_s + a[..., None] * ratio).logsumexp(-1)

    for _ in range(60):
        a = (low + high) / 2
        if method == "kl_symmetry":
            above = ((log_s + a[..., None] * ratio).softmax(-1) * ratio).sum(-1) > 0
        else:
            above = log_norm(-a) > log_norm(2 - a)  # of sum s^2 / q and sum t^2 / q
        high, low = torch.where(above, a, high), torch.where(above, low, a)
    return (log_s + a[..., None] * ratio).log_softmax(-1), a


def exact_answers(student: torch.nn.Module, teacher: torch.nn.Module, method: str = "kl_symmetry") -> torch.Tensor:
    """Probability of each of ``ANSWERS`` under the mixture, [answers]."""
    log_q, _ = mixed(step_log_probs(student, STUDENT_PROMPT), step_log_probs(teacher, TEACHER_PROMPT), method)
    return log_q.gather(-1, torch.tensor(ANSWERS)[..., None])[..., 0].sum(-1).exp()


def chi_square(results: Iterable[GenerationResult], probabilities: torch.Tensor) -> float:
    """p-value of the answers' frequencies; answers expected fewer than 8 times share one cell."""
    place = {answer: i for i, answer in enumerate(ANSWERS)}
    found = torch.bincount(
        torch.tensor([place[tuple(result.response_ids)] for result in results]), minlength=len(ANSWERS)
    ).double()
    expected = probabilities * found.sum()
    rare = expected < 8
    found = torch.cat([found[~rare], found[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 8:  # too few even together: they join the rarest of the others
        found = torch.cat([found[:-2], found[-2:].sum()[None]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    return float(stats.chisquare(found.numpy(), expected.numpy()).pvalue)
