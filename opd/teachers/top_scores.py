"""A served teacher's log-probs of the likeliest tokens at each response position, for a loss over K tokens.

The teacher's own K come with the score. For the student's K the server takes one list of ids for all positions of a
request, so a request covers some positions (``opd.config.student_support``) and asks for the union of their ids. Each
request reads on where the last one ended, which the server's prefix cache makes as cheap as one pass.

Shape legend: T response tokens, K tokens per position, U ids in a union.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opd.serving.top_logprobs import nested_rows, top_rows
from opd.types import TopLogprobs

Rows = tuple[np.ndarray, np.ndarray]  # ids [T, K], their log-probs [T, K] in nats

# Nats. A server's sampled-token and top log-probs come from the same logits; another position's differ by whole nats.
LARGEST_DISAGREEMENT = 0.05
# Probabilities of distinct tokens may exceed 1 in sum by rounding only.
LARGEST_EXCESS = 1e-3


@dataclass(frozen=True, kw_only=True)
class TopRequest:
    """
    Args:
        count: K.
        support: whose likeliest tokens: "teacher", "student" or "union" (both, each token once).
        vocab_size: the student's; the teacher must not answer with ids beyond it.
    """

    count: int
    support: str = "teacher"
    vocab_size: int

    @property
    def of_teacher(self) -> bool:
        return self.support in ("teacher", "union")

    @property
    def of_student(self) -> bool:
        return self.support in ("student", "union")


def teacher_rows(meta_info: dict[str, Any], request: TopRequest, *, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T, K], log-probs [T, K]) of the teacher's likeliest tokens at the last ``positions`` input positions.

    Raises:
        ValueError: missing rows, or ids that the student does not have.
    """
    ids_TK, logprobs_TK = top_rows(meta_info, "input", positions=positions, count=request.count)
    if ids_TK.min() < 0 or ids_TK.max() >= request.vocab_size:
        raise ValueError(f"top ids {ids_TK.min()} to {ids_TK.max()} for a vocabulary of {request.vocab_size}")
    if any(len(set(row)) < len(row) for row in ids_TK.tolist()):
        raise ValueError("a position names a top id twice")
    return ids_TK, logprobs_TK


def chosen_rows(meta_info: dict[str, Any], union_U: np.ndarray, chosen_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of the ids that were asked about: ``union_U`` (ascending) at every position, of which each wants its
    own.

    Raises:
        ValueError: missing rows, or other ids than were asked about.
    """
    ids_TU, logprobs_TU = nested_rows(meta_info.get("input_token_ids_logprobs"), positions=len(chosen_TK))
    if ids_TU.shape != (len(chosen_TK), len(union_U)) or (ids_TU != union_U).any():
        raise ValueError(f"{ids_TU.shape} log-probs of other ids than the {len(union_U)} asked about")
    columns_TK = np.searchsorted(union_U, chosen_TK)
    return chosen_TK, np.take_along_axis(logprobs_TU, columns_TK, axis=1)


def check_rows(
    ids_TK: np.ndarray, logprobs_TK: np.ndarray, response_ids: list[int], response_logprobs: list[float]
) -> None:
    """What every row of log-probs of distinct tokens obeys, and that it is about the position it is given for.

    Raises:
        ValueError: a value that is no log-prob, too much probability, or a sampled token that has two log-probs.
    """
    if not np.isfinite(logprobs_TK).all():
        raise ValueError("a top log-prob is not finite")
    most = float(np.exp(logprobs_TK).sum(axis=1).max())
    if most > 1 + LARGEST_EXCESS:
        raise ValueError(f"top tokens of one position have a probability of {most:.4g} together")
    sampled_T1 = np.array(response_ids)[:, None]
    gap_TK = np.abs(logprobs_TK - np.array(response_logprobs)[:, None])[ids_TK == sampled_T1]
    if gap_TK.size and float(gap_TK.max()) > LARGEST_DISAGREEMENT:
        raise ValueError(f"a token's log-prob and its top log-prob differ by {float(gap_TK.max()):.3g} nats")


def joined(pieces: list[list[Rows]]) -> TopLogprobs:
    """Of one or two sources in each piece of an answer; the pieces in order. See ``merged``."""
    return merged(
        [
            (np.concatenate([ids for ids, _ in source]), np.concatenate([values for _, values in source]))
            for source in zip(*pieces, strict=True)
        ]
    )


def merged(parts: list[Rows]) -> TopLogprobs:
    """Rows of one or two sources side by side; a token that both name is kept once, the other is id -1."""
    ids_TK = np.concatenate([ids for ids, _ in parts], axis=1).astype(np.int32)
    logprobs_TK = np.concatenate([logprobs for _, logprobs in parts], axis=1)
    if len(parts) == 2:
        first, second = parts[0][0], parts[1][0]
        again_TK = (second[:, :, None] == first[:, None, :]).any(axis=2)
        ids_TK[:, first.shape[1] :][again_TK] = -1
        logprobs_TK[:, first.shape[1] :][again_TK] = 0.0
    return TopLogprobs(ids_TK=torch.from_numpy(ids_TK), logprobs_TK=torch.from_numpy(logprobs_TK).float())
