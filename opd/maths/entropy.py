"""Log-softmax and entropy of next-token distributions, vocabulary-parallel, gradient of the entropy in closed form."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from opd.maths.vocab_parallel import all_reduce_sum, log_softmax_into, wide_dtype


def token_entropy(
    logits_TV: torch.Tensor, *, temperature: float = 1.0, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """``-sum p log p`` with ``p = softmax(logits / temperature)``, in nats, float32 or the wider type of ``logits``.

    With ``group``, ``logits_TV`` is this rank's slice of the vocabulary; the result is equal on all ranks and the
    gradient stays local to the slice. A column of the lowest number of its type (padding) has no part in it.

    Raises:
        ValueError: ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    return _TokenEntropy.apply(logits_TV, float(temperature), group)


def log_softmax(
    logits_TV: torch.Tensor, *, temperature: float, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs, probabilities), new tensors, float32 or wider; no gradient passes through."""
    log_TV = torch.empty_like(logits_TV, dtype=wide_dtype(logits_TV))
    prob_TV = torch.empty_like(log_TV)
    log_softmax_into(logits_TV.detach(), temperature=temperature, group=group, log_BV=log_TV, prob_BV=prob_TV)
    return log_TV, prob_TV


class _TokenEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, temperature: float, group: Any) -> torch.Tensor:
        log_TV, prob_TV = log_softmax(logits_TV, temperature=temperature, group=group)
        entropy_T = all_reduce_sum(log_TV.mul_(prob_TV).sum(-1).neg_(), group)
        ctx.save_for_backward(logits_TV, entropy_T)
        ctx.temperature, ctx.group = temperature, group
        return entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_TV, entropy_T = ctx.saved_tensors
        log_TV, prob_TV = log_softmax(logits_TV, temperature=ctx.temperature, group=ctx.group)
        grad_TV = prob_TV.mul_(log_TV.add_(entropy_T[:, None])).mul_(-grad_T[:, None] / ctx.temperature)
        return grad_TV.to(logits_TV.dtype), None, None
