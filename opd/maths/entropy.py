"""Log-softmax and entropy of next-token distributions, vocabulary-parallel; the entropy's gradient in closed form."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


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


class _TokenEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, temperature: float, group: Any) -> torch.Tensor:
        logprobs_TV = log_softmax(logits_TV, temperature=temperature, group=group)
        probs_TV = logprobs_TV.exp()
        # 0 * log 0: a probability that underflows, or a padded column, adds nothing
        entropy_T = -torch.where(probs_TV > 0, probs_TV * logprobs_TV, probs_TV).sum(-1)
        _sum(entropy_T, group)
        ctx.save_for_backward(logits_TV, entropy_T)
        ctx.temperature, ctx.group = temperature, group
        return entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_TV, entropy_T = ctx.saved_tensors
        logprobs_TV = log_softmax(logits_TV, temperature=ctx.temperature, group=ctx.group)
        probs_TV = logprobs_TV.exp()
        inner_TV = torch.where(probs_TV > 0, logprobs_TV + entropy_T[:, None], probs_TV)
        grad_TV = probs_TV.mul_(inner_TV).mul_(-grad_T[:, None] / ctx.temperature)
        return grad_TV.to(logits_TV.dtype), None, None


def log_softmax(logits_TV: torch.Tensor, *, temperature: float, group: dist.ProcessGroup | None) -> torch.Tensor:
    """A new tensor, float32 or wider, this rank's slice of the vocabulary; no gradient passes through ``group``."""
    wide = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    scaled_TV = logits_TV.to(wide) / temperature
    max_T = scaled_TV.amax(-1)
    if group is not None:
        dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
    sumexp_T = (scaled_TV - max_T[:, None]).exp_().sum(-1)
    _sum(sumexp_T, group)
    return scaled_TV.sub_((max_T + sumexp_T.log())[:, None])


def _sum(tensor: torch.Tensor, group: Any) -> None:
    if group is not None:
        dist.all_reduce(tensor, group=group)
