"""Drawing one token per row from logits, with noise that belongs to the request and not to the batch it is in.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from opd.types import SamplingParams


def request_noise(seed: int, key: int, count: int, *, stream: int = 0) -> np.ndarray:
    """``count`` uniforms in [0, 1), float64, from a counter-based generator keyed by (seed, key).

    The same request gets the same noise whatever runs beside it, so a resumed run repeats its draws. Streams are
    independent of one another: one for each purpose that a token needs a number for.
    """
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    bits = np.random.Philox(key=np.array([seed, key], dtype=np.uint64), counter=counter)
    return np.random.Generator(bits).random(count)


def sample_tokens(
    logits_BV: torch.Tensor, uniforms_B: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, log-probs in nats) of one draw per row.

    The log-prob is ``log softmax(logits / temperature)`` of the token, before top-k and top-p: what SGLang reports
    and what a trainer can recompute. At temperature 0 the choice is the argmax and the log-prob is at temperature 1.
    """
    logits_BV = logits_BV.float()
    if params.temperature == 0:
        logprobs_BV = logits_BV.log_softmax(-1)
        ids_B = logits_BV.argmax(-1)
    else:
        logprobs_BV = (logits_BV / params.temperature).log_softmax(-1)
        kept_BV = truncate(logprobs_BV, top_k=params.top_k, top_p=params.top_p)
        ids_B = draw_weighted(kept_BV.exp(), uniforms_B)
    return ids_B, logprobs_BV.gather(1, ids_B[:, None])[:, 0]


def draw_weighted(weights_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """One id per row with probability proportional to its weight, by inversion of the cumulative sum. A weight of 0 is
    never drawn; a row with NaN gives an id that means nothing."""
    cumulative_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    total_B = cumulative_BV[:, -1]
    target_B = torch.minimum(uniforms_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    ids_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    return ids_B.clamp_max(weights_BV.shape[-1] - 1)


def truncate(logprobs_BV: torch.Tensor, *, top_k: int, top_p: float) -> torch.Tensor:
    """Sets tokens outside the top k, or outside the smallest set with mass >= top_p, to -inf (not renormalised)."""
    if top_k > 0 and top_k < logprobs_BV.shape[-1]:
        kth_B1 = logprobs_BV.topk(top_k, dim=-1).values[:, -1:]
        logprobs_BV = logprobs_BV.masked_fill(logprobs_BV < kth_B1, -torch.inf)
    if top_p < 1.0:
        sorted_BV, order_BV = logprobs_BV.softmax(-1).sort(dim=-1, descending=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p  # mass before this token already suffices
        logprobs_BV = logprobs_BV.masked_fill(outside_BV.scatter(1, order_BV, outside_BV), -torch.inf)
    return logprobs_BV
