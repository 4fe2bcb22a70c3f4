"""What a model says of a batch's response tokens, without gradients; of the saved samples, its likeliest tokens too.

The likely tokens take the output head once more, for the rows of the saved samples alone: a step saves a handful.

Shapes: T response tokens of the batch, R those that this rank's positions predict, S those of the saved samples, K
likely tokens at a position, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state as mpu

from opd.data.batching import MicroBatchLimit
from opd.maths.head import token_scores
from opd.maths.likely import likely_tokens
from opd.megatron_backend.pipeline import (
    MicroBatch,
    gather_tokens,
    rows_in_batch_order,
    run,
    split,
    whole_rows,
    whole_tokens,
)
from opd.types import TokenBatch, TopLogprobs


@dataclass(frozen=True, kw_only=True)
class ResponseScores:
    """Of all response tokens of a batch, float32 on the CPU.

    Attributes:
        logprobs: nats, one [T] for each temperature; on every rank.
        entropy_T: nats, at the first temperature; on every rank.
        hidden_TH: what the output layer read, in the model's type; on the last pipeline stage, if asked for.
        likely: of the saved samples, by ``sample_N``, at the last temperature; on every rank, if asked for.
    """

    logprobs: list[torch.Tensor]
    entropy_T: torch.Tensor
    hidden_TH: torch.Tensor | None = None
    likely: dict[int, TopLogprobs] = field(default_factory=dict)


def response_scores(
    model: torch.nn.Module,
    batch: TokenBatch,
    *,
    limit: MicroBatchLimit,
    chunk: int,
    temperatures: list[float],
    keep_hidden: bool = False,
    likely: int = 0,
) -> ResponseScores:
    """Log-probs at each temperature and entropies of all response tokens of ``batch``, without gradients.

    Args:
        limit: of a micro-batch.
        chunk: response tokens whose logits exist at the same time.
        likely: how many of the likeliest tokens at each position of the samples that ``batch.saved_N`` marks.
    """
    likely = likely if any(saved_lengths(batch)) else 0

    def score(micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden_RH, head = micro.hidden_RH(), micro.head()
        scores = token_scores(
            hidden_RH, head, micro.packed.target_ids_R, temperatures=temperatures, with_entropy=True, chunk=chunk
        )
        outputs = {"scores": whole_tokens(micro, torch.stack(scores).float())}
        if keep_hidden:
            outputs["hidden"] = whole_rows(micro, hidden_RH.to(head.weight_VH.dtype)).cpu()
        if likely:
            outputs["likely"] = _likely(micro, hidden_RH, count=likely, temperature=temperatures[-1], chunk=chunk)
        return hidden_RH.new_zeros(()), outputs

    plan = split(batch, limit)
    results = run(model, batch, plan, score, forward_only=True)
    lengths = batch.response_lengths
    scores = gather_tokens(lengths, plan, [r["scores"] for r in results], rows=len(temperatures) + 1)
    *logprobs, entropy_T = scores
    hidden_TH = None
    if keep_hidden and mpu.is_pipeline_last_stage():
        hidden_TH = rows_in_batch_order(lengths, plan, [r.pop("hidden") for r in results])
    found: dict[int, TopLogprobs] = {}
    if likely:
        pieces = [r["likely"] for r in results]
        rows_KS = gather_tokens(saved_lengths(batch), plan, pieces, rows=2 * likely, dtype=torch.float64)
        found = likely_by_sample(batch, rows_KS)
    return ResponseScores(logprobs=logprobs, entropy_T=entropy_T, hidden_TH=hidden_TH, likely=found)


def saved_lengths(batch: TokenBatch) -> list[int]:
    """Response tokens of each sample that is saved, 0 of the others."""
    if batch.saved_N is None:
        return [0] * len(batch)
    return [n if saved else 0 for n, saved in zip(batch.response_lengths, batch.saved_N.tolist(), strict=True)]


def saved_mask(batch: TokenBatch) -> torch.Tensor:
    """[T] bool: tokens of saved samples."""
    return batch.per_token(torch.tensor(saved_lengths(batch)) > 0)


def likely_rows(ids_SK: torch.Tensor, logprobs_SK: torch.Tensor) -> torch.Tensor:
    """[2K, S] float64, which holds every id exactly: both as one tensor for a collective."""
    return torch.cat([ids_SK, logprobs_SK], dim=1).t().double()


def likely_by_sample(batch: TokenBatch, rows_KS: torch.Tensor) -> dict[int, TopLogprobs]:
    """What ``likely_rows`` made of all saved tokens of ``batch`` in its order, by ``sample_N``."""
    ids_SK, logprobs_SK = rows_KS.t().cpu().chunk(2, dim=1)
    lengths = saved_lengths(batch)
    pieces = zip(batch.sample_N.tolist(), lengths, ids_SK.split(lengths), logprobs_SK.split(lengths), strict=True)
    return {
        sample: TopLogprobs(ids_TK=ids.long(), logprobs_TK=logprobs.float())
        for sample, length, ids, logprobs in pieces
        if length
    }


def _likely(micro: MicroBatch, hidden_RH: torch.Tensor, *, count: int, temperature: float, chunk: int) -> torch.Tensor:
    """[2K, S] of the micro-batch, over context-parallel ranks."""
    saved_T = saved_mask(micro.batch).to(hidden_RH.device)
    saved_R = saved_T[micro.packed.place_R]
    found = likely_tokens(hidden_RH[saved_R], micro.head(), count=count, temperature=temperature, chunk=chunk)
    rows_KS = likely_rows(*found)
    values_KR = rows_KS.new_zeros(rows_KS.shape[0], hidden_RH.shape[0])
    values_KR[:, saved_R] = rows_KS
    return whole_tokens(micro, values_KR)[:, saved_T]
