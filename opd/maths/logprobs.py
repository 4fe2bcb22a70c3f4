"""Log-probabilities of given tokens, vocabulary-parallel, and the one place where logits meet the token they predict.

Shapes: T tokens, V the vocabulary (V/tp of it on each rank when ``group`` is given).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from opd.maths.vocab_parallel import all_reduce_max, all_reduce_sum, locate, wide_dtype

_CHUNK = 1024  # rows upcast at a time: the extra memory is CHUNK x V/tp, not T x V


def token_logprobs(
    logits_TV: torch.Tensor,
    token_ids_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """``log softmax(logits / temperature)`` at ``token_ids``, in nats, float32 or the wider type of ``logits``.

    ``logits_TV[t]`` must already be the row that predicts ``token_ids_T[t]`` (see ``predicting_rows``). With
    ``group``, ``logits_TV`` is this rank's contiguous slice of the vocabulary and the result is equal on all ranks;
    the gradient stays local to the slice. The backward pass recomputes the softmax chunk by chunk.

    Raises:
        ValueError: lengths differ, or ``temperature`` is not positive.
    """
    if logits_TV.shape[0] != token_ids_T.shape[0]:
        raise ValueError(
            f"{logits_TV.shape[0]} rows of logits for {token_ids_T.shape[0]} tokens: one row per token is needed"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    return _TokenLogprobs.apply(logits_TV, token_ids_T, float(temperature), group)


def predicting_rows(length: int, response_length: int) -> slice:
    """Rows of a sequence's logits that predict its response: position p predicts token p + 1."""
    return slice(length - response_length - 1, length - 1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, ids_T: torch.Tensor, temperature: float, group: Any) -> torch.Tensor:
        local_T, here_T = locate(ids_T, logits_TV.shape[1], group)

        max_T = (logits_TV.amax(dim=-1) if logits_TV.numel() else logits_TV.sum(-1)).to(wide_dtype(logits_TV))
        max_T = max_T / temperature
        all_reduce_max(max_T, group)
        sumexp_T = torch.cat(
            [
                ((rows.to(max_T.dtype) / temperature) - m[:, None]).exp_().sum(-1)
                for rows, m in zip(logits_TV.split(_CHUNK), max_T.split(_CHUNK), strict=True)
            ]
        )
        target_T = logits_TV.gather(1, local_T[:, None])[:, 0].to(max_T.dtype) / temperature
        target_T = torch.where(here_T, target_T, torch.zeros_like(target_T))
        all_reduce_sum(sumexp_T, group)
        all_reduce_sum(target_T, group)

        logsumexp_T = max_T + sumexp_T.log()
        ctx.save_for_backward(logits_TV, local_T, here_T, logsumexp_T)
        ctx.temperature = temperature
        return target_T - logsumexp_T

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_TV, local_T, here_T, logsumexp_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        for start in range(0, logits_TV.shape[0], _CHUNK):
            rows = slice(start, start + _CHUNK)
            chunk = ((logits_TV[rows].to(logsumexp_T.dtype) / ctx.temperature) - logsumexp_T[rows, None]).exp_().neg_()
            chunk.scatter_add_(1, local_T[rows, None], here_T[rows, None].to(chunk.dtype))
            grad_TV[rows] = (chunk * (grad_T[rows, None] / ctx.temperature)).to(grad_TV.dtype)
        return grad_TV, None, None, None
