"""From hidden states to per-token numbers, without ever holding the logits of all tokens.

The logits of a long batch are its largest tensor by far: ``R x V`` numbers, 20 GB for 32k tokens of a 150k vocabulary
in fp32. Here they exist for one chunk of rows at a time and are computed again in the backward pass.

Shapes: R rows (positions that predict a response token), C rows of a chunk, H hidden, V this rank's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from opd.maths.entropy import token_entropy
from opd.maths.logprobs import token_logprobs
from opd.maths.vocab_parallel import first_column, wide_dtype

# (logits of the chunk, which rows these are) -> per-token tensors [C]
RowFn = Callable[[torch.Tensor, slice], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """The last matrix of a language model, or this rank's rows of it.

    Args:
        vocab_size: real tokens; rows above them are padding.
        group: ranks that share the vocabulary, contiguous slices in rank order; None for one.
    """

    weight_VH: torch.Tensor
    vocab_size: int
    group: dist.ProcessGroup | None = None

    def real_columns(self, columns: int) -> int:
        """How many of this rank's ``columns`` are tokens, not padding."""
        return max(0, min(columns, self.vocab_size - first_column(columns, self.group)))

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """[C, V], float32 or wider. Padded columns hold the lowest number: no probability, no gradient, and no NaN
        where -inf would meet a probability of 0."""
        logits_CV = hidden_CH.to(self.weight_VH.dtype) @ self.weight_VH.t()
        if logits_CV.dtype not in (torch.float32, torch.float64):
            logits_CV = logits_CV.float()
        columns = logits_CV.shape[1]
        real = self.real_columns(columns)
        if real < columns:
            logits_CV[:, real:] = torch.finfo(logits_CV.dtype).min
        return logits_CV


def token_scores(
    hidden_RH: torch.Tensor,
    head: OutputHead,
    ids_R: torch.Tensor,
    *,
    temperatures: list[float],
    with_entropy: bool = False,
    chunk: int,
) -> tuple[torch.Tensor, ...]:
    """Log-probs (nats) [R] of ``ids_R`` at each temperature, then the entropy [R] at the first one if asked for.

    Differentiable in ``hidden_RH`` and the head's weight. Under tensor parallelism the gradient of ``hidden_RH`` is
    this rank's part: the caller sums it over the ranks.
    """

    def score(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        scores = [token_logprobs(logits_CV, ids_R[rows], temperature=t, group=head.group) for t in temperatures]
        if with_entropy:
            scores.append(token_entropy(logits_CV, temperature=temperatures[0], group=head.group))
        return tuple(scores)

    return through_head(hidden_RH, head, score, chunk=chunk)


def through_head(hidden_RH: torch.Tensor, head: OutputHead, fn: RowFn, *, chunk: int) -> tuple[torch.Tensor, ...]:
    """``fn`` of the logits of all rows, chunk by chunk; ``fn`` must treat rows independently."""
    return _ThroughHead.apply(hidden_RH, head.weight_VH, head, fn, chunk)


class WeightGradient:
    """Sum over chunks of ``grad_CV.T @ hidden_CH``, in float32 or the weight's wider type: with a bfloat16 sum the
    later chunks of a long batch would be rounded away."""

    def __init__(self, weight_VH: torch.Tensor) -> None:
        dtype = wide_dtype(weight_VH)
        self.sum_VH = torch.zeros(weight_VH.shape, dtype=dtype, device=weight_VH.device)

    def add(self, grad_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        if grad_CV.dtype == self.sum_VH.dtype:
            self.sum_VH.addmm_(grad_CV.t(), hidden_CH)
        else:
            self.sum_VH.add_(grad_CV.t() @ hidden_CH)


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RH: torch.Tensor, weight_VH: torch.Tensor, head: OutputHead, fn: RowFn, chunk: int
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(hidden_RH, weight_VH)
        ctx.head, ctx.fn, ctx.chunk = head, fn, chunk
        pieces = [fn(head.logits(hidden_RH[rows]), rows) for rows in chunks(hidden_RH, chunk)]
        return tuple(torch.cat(column) for column in zip(*pieces, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads_R: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_RH, weight_VH = ctx.saved_tensors
        grad_hidden_RH = torch.empty_like(hidden_RH) if ctx.needs_input_grad[0] else None
        total = WeightGradient(weight_VH) if ctx.needs_input_grad[1] else None
        for rows in chunks(hidden_RH, ctx.chunk):
            hidden_CH = hidden_RH[rows].to(weight_VH.dtype)
            logits_CV = ctx.head.logits(hidden_CH).requires_grad_()
            with torch.enable_grad():
                outputs = ctx.fn(logits_CV, rows)
            (grad_CV,) = torch.autograd.grad(outputs, logits_CV, [g[rows] for g in grads_R])
            grad_CV = grad_CV.to(weight_VH.dtype)
            if grad_hidden_RH is not None:
                grad_hidden_RH[rows] = (grad_CV @ weight_VH).to(hidden_RH.dtype)
            if total is not None:
                total.add(grad_CV, hidden_CH)
        return grad_hidden_RH, None if total is None else total.sum_VH.to(weight_VH.dtype), None, None, None


def chunks(hidden_RH: torch.Tensor, chunk: int) -> list[slice]:
    """At least one: a context-parallel rank may predict nothing, and still has a graph to take part in."""
    return [slice(start, start + chunk) for start in range(0, max(1, hidden_RH.shape[0]), chunk)]
