"""The likeliest next tokens at some positions, and their log-probs: what a reader is shown beside the token itself.

Shapes: R rows (positions), C rows of a chunk, H hidden, V this rank's slice of the vocabulary, K tokens kept.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from opd.maths.head import OutputHead, chunks
from opd.maths.vocab_parallel import exp_into, gather_logprobs, top_ids, wide_dtype


@torch.no_grad()
def likely_tokens(
    hidden_RH: torch.Tensor, head: OutputHead, *, count: int, temperature: float, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [R, K] of the K likeliest tokens of each row, likeliest first, and ``log softmax(logits / temperature)`` at
    them (nats) [R, K]. Equal on all ranks of ``head.group``.

    Args:
        count: K, at most the vocabulary's size.
        chunk: rows whose logits exist at the same time.
    """
    pieces = [
        likely_of_logits(head.logits(hidden_RH[rows]), count=count, temperature=temperature, group=head.group)
        for rows in chunks(hidden_RH, chunk)
    ]
    ids, logprobs = zip(*pieces, strict=True)
    return torch.cat(ids), torch.cat(logprobs)


@torch.no_grad()
def likely_of_logits(
    logits_CV: torch.Tensor, *, count: int, temperature: float, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of logits, whose padded columns hold the lowest number."""
    ids_CK = top_ids(logits_CV, count, group)
    shifted_CV = torch.empty_like(logits_CV, dtype=wide_dtype(logits_CV))
    total_C = exp_into(
        logits_CV, temperature=temperature, group=group, shifted_BV=shifted_CV, exp_BV=torch.empty_like(shifted_CV)
    )
    return ids_CK, gather_logprobs(shifted_CV, total_C, ids_CK, group)
