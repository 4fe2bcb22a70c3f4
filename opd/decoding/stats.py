"""What a mixture's decoding cost and how many drafts were kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class MixtureStats:
    """Counters over all calls that were given this object."""

    rounds: int = 0  # forward passes of the teacher, without prompts
    row_rounds: int = 0  # the same, summed over the answers that took part
    tokens: int = 0  # response tokens
    judged: int = 0  # drafts up to the first rejection
    accepted: int = 0
    seconds: float = 0.0  # of decoding, prompts included

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.judged if self.judged else None

    @property
    def tokens_per_round(self) -> float | None:
        """Of one answer in one round."""
        return self.tokens / self.row_rounds if self.row_rounds else None

    def add_round(self, rows: int, *, judged: int = 0, accepted: int = 0) -> None:
        self.rounds += 1
        self.row_rounds += rows
        self.judged += judged
        self.accepted += accepted
