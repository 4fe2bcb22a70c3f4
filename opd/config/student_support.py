"""What a served teacher's log-probs of the student's own likeliest ids cost on the wire.

SGLang takes one list of ids for all positions of a request, so an answer is scored in pieces: each sends everything
before it again, and gets a log-prob of every id that any of its positions wants. Longer pieces are fewer, and answer
with more. The answers are most of it, so the number of pieces grows with the answer: at 16,384 tokens and 16 ids, 32
pieces would answer with 5 times the bytes of 512.

Shape legend: T response tokens, C tokens of a piece, K ids of each token, U distinct ids of a piece.
"""

from __future__ import annotations

from dataclasses import dataclass

SENT_ID_BYTES = 7  # 5 or 6 digits and the separator, as JSON
ASKED_ID_BYTES = 33  # an id that was asked about, as SGLang 0.5.23 answers: [log-prob, id, null]
LEAST_POSITIONS = 32  # fewer: more requests for the same bytes, and each has a price of its own
# U = 1.15 K C^0.66, within 25% for K of 4 to 64 and C up to 128: SmolLM2-135M on 16,384 tokens of technical English.
_DISTINCT, _GROWTH = 1.15, 0.66


@dataclass(frozen=True, kw_only=True)
class SupportCost:
    """Of one answer."""

    requests: int
    sent: float  # bytes
    answered: float


def distinct_ids(positions: int, count: int) -> float:
    """U: how many ids a piece asks about."""
    return min(count * positions, _DISTINCT * count * positions**_GROWTH)


def positions_per_request(length: int, count: int) -> int:
    """C for an answer of ``length`` tokens: near the least of sent T^2/2C ids and answered T U(C) entries."""
    slope = SENT_ID_BYTES * length / (2 * ASKED_ID_BYTES * _DISTINCT * _GROWTH * count)
    return max(LEAST_POSITIONS, round(slope ** (1 / (1 + _GROWTH))))


def support_cost(*, prompt: int, response: int, count: int, id_bytes: float = SENT_ID_BYTES) -> SupportCost:
    """
    Args:
        prompt, response: tokens.
        count: K.
        id_bytes: of an id in a request.
    """
    if response < 1:
        return SupportCost(requests=0, sent=0.0, answered=0.0)
    size = positions_per_request(response, count)
    pieces = [min(size, response - first) for first in range(0, response, size)]
    written, sent, answered = prompt, 0.0, 0.0
    for positions in pieces:
        written += positions
        asked = distinct_ids(positions, count)
        sent += (written + asked) * id_bytes
        answered += positions * asked * ASKED_ID_BYTES
    return SupportCost(requests=len(pieces), sent=sent, answered=answered)
