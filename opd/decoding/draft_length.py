"""How many tokens the student drafts in a round.

A round of k drafts takes about ``t0 + t1 k`` seconds (k passes of the student, one of the teacher over k positions)
and gives ``1 + b + ... + b^(k-1)`` tokens per answer when drafts are accepted with probability b. Both are measured as
the run goes, and k maximises tokens per second.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DECAY = 0.97  # of what a round counts, per later round: conditions change as answers end
FIRST_TRIALS = (3, 6, 2)  # two lengths at least are needed for t0 and t1
TRIAL_EVERY = 24  # rounds between trials of a neighbouring length, without which the fit would go stale


@dataclass
class _Fit:
    """Exponentially weighted least squares of the seconds of a round on its number of drafts."""

    rounds: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of 1, k, k^2, seconds, k * seconds

    def add(self, k: int, seconds: float) -> None:
        new = (1.0, k, k * k, seconds, k * seconds)
        self.sums = [DECAY * old + value for old, value in zip(self.sums, new, strict=True)]
        self.rounds += 1

    def line(self) -> tuple[float, float]:
        """(t0, t1), neither negative."""
        n, k, kk, t, kt = self.sums
        spread = n * kk - k * k
        slope = max((n * kt - k * t) / spread, 0.0) if spread > 1e-9 * n * kk else 0.0
        slope = min(slope, t / k)
        return (t - slope * k) / n, slope


class DraftLength:
    """
    Args:
        fixed: always this many; None: adapted.
        longest: never more.
    """

    def __init__(self, fixed: int | None = None, *, longest: int = 12) -> None:
        self._fixed = fixed
        self.longest = longest if fixed is None else fixed
        self._judged = self._accepted = 0.0
        self._fits: dict[int, _Fit] = {}  # by the number of answers, in powers of two

    @property
    def acceptance(self) -> float:
        """Share of the judged drafts that were kept, recent rounds counting most; 0.8 before the first."""
        return (self._accepted + 0.8) / (self._judged + 1.0)

    def choose(self, rows: int) -> int:
        """For a round over so many answers."""
        if self._fixed is not None:
            return self._fixed
        fit = self._fits.setdefault(rows.bit_length(), _Fit())
        if fit.rounds < len(FIRST_TRIALS):
            return min(FIRST_TRIALS[fit.rounds], self.longest)
        best = self._best(fit)
        if fit.rounds % TRIAL_EVERY == 0:
            best += 2 if (fit.rounds // TRIAL_EVERY) % 2 else -2
        return min(max(best, 1), self.longest)

    def observe(self, rows: int, k: int, *, seconds: float, judged: int, accepted: int) -> None:
        """Of a round with k drafts for each of ``rows`` answers."""
        self._judged = DECAY * self._judged + judged
        self._accepted = DECAY * self._accepted + accepted
        if self._fixed is None:
            self._fits.setdefault(rows.bit_length(), _Fit()).add(k, seconds)

    def _best(self, fit: _Fit) -> int:
        t0, t1 = fit.line()
        return max(range(1, self.longest + 1), key=lambda k: expected_tokens(self.acceptance, k) / (t0 + t1 * k))


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens per answer that a round of k drafts gives, each kept with the same probability, independently."""
    return float(k) if acceptance == 1 else (1 - acceptance**k) / (1 - acceptance)
