"""A language small enough to write down: 3 tokens, answers of at most 3, token 0 ends one. 15 answers in all.

Each prefix has its own softmax, so any policy over these answers is a table of logits. Expectations are sums, and
exact gradients come from differentiating them: nothing is sampled. All in float64.
"""

from __future__ import annotations

import itertools

import torch

VOCAB, LONGEST, END = 3, 3, 0
TOLERANCE = 1e-10  # of a gradient whose entries are about 0.1; the promise is 1e-6


def _answers() -> list[tuple[int, ...]]:
    open_answers = [
        answer
        for length in range(1, LONGEST + 1)
        for answer in itertools.product(range(VOCAB), repeat=length)
        if END not in answer[:-1]
    ]
    return [answer for answer in open_answers if answer[-1] == END or len(answer) == LONGEST]


ANSWERS = _answers()
LENGTHS = [len(answer) for answer in ANSWERS]
PREFIXES = sorted({answer[:t] for answer in ANSWERS for t in range(len(answer))})
# Of each token of each answer, all in a row [T]: the row of its prefix, the token, and its answer.
ROW_T = torch.tensor([PREFIXES.index(answer[:t]) for answer in ANSWERS for t in range(len(answer))])
TOKEN_T = torch.tensor([token for answer in ANSWERS for token in answer])
ANSWER_T = torch.arange(len(ANSWERS)).repeat_interleave(torch.tensor(LENGTHS))


def logits(seed: int) -> torch.Tensor:
    """[prefixes, VOCAB]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), VOCAB, dtype=torch.float64, generator=generator)


def student(seed: int = 1) -> torch.Tensor:
    return logits(seed).requires_grad_()


def rewards(seed: int = 5) -> torch.Tensor:
    """[answers]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(ANSWERS), dtype=torch.float64, generator=generator)


def token_logprobs(logits_PV: torch.Tensor) -> torch.Tensor:
    """[T] of every token of every answer."""
    return logits_PV.log_softmax(-1)[ROW_T, TOKEN_T]


def answer_sums(values_T: torch.Tensor) -> torch.Tensor:
    """[answers] sums over each answer's tokens."""
    return values_T.new_zeros(len(ANSWERS)).index_add(0, ANSWER_T, values_T)


def probabilities(logits_PV: torch.Tensor) -> torch.Tensor:
    """[answers], differentiable; they add up to 1."""
    return answer_sums(token_logprobs(logits_PV)).exp()


def reach(logits_PV: torch.Tensor) -> torch.Tensor:
    """[prefixes] how often the policy gets there, held fixed."""
    probability_N = probabilities(logits_PV).detach()
    return torch.stack([probability_N[continues(prefix)].sum() for prefix in PREFIXES])


def continues(prefix: tuple[int, ...]) -> torch.Tensor:
    """[answers] bool: those that go on after this prefix."""
    return torch.tensor([len(answer) > len(prefix) and answer[: len(prefix)] == prefix for answer in ANSWERS])


def kl_of_rows(first_PV: torch.Tensor, second_PV: torch.Tensor) -> torch.Tensor:
    """[prefixes] KL(first || second) of the next token."""
    first, second = first_PV.log_softmax(-1), second_PV.log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1)


def kl_of_answers(first_PV: torch.Tensor, second_PV: torch.Tensor) -> torch.Tensor:
    """KL(first || second) between the distributions of whole answers."""
    difference_N = answer_sums(token_logprobs(first_PV) - token_logprobs(second_PV))
    return (probabilities(first_PV) * difference_N).sum()


def expected(loss_T: torch.Tensor, logits_PV: torch.Tensor) -> torch.Tensor:
    """What a batch of answers from this policy has on average: the sum of ``loss_T`` over an answer's tokens."""
    return (probabilities(logits_PV).detach() * answer_sums(loss_T)).sum()


def gradient(value: torch.Tensor, logits_PV: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits_PV, retain_graph=True)[0]


def assert_same_gradient(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.abs().max() > 1e-2, "nothing to compare with"
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
