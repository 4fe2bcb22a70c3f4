"""What a health report of a teacher's server consists of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Verdict(Enum):
    PASS = "PASS"
    WARN = "WARN"  # a run works, and could work better
    FAIL = "FAIL"  # a run would be refused, or learn something wrong
    NOTE = "-"  # nothing to judge, or not looked at


@dataclass(frozen=True, kw_only=True)
class HealthRow:
    """
    Args:
        found: a few words, for a cell of a table.
        remedy: what to do about WARN or FAIL.
        numbers: what was measured, by name with unit, for machines.
    """

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    url: str
    rows: list[HealthRow]
    model: str | None = None  # as the server calls it
    probe_scores: list[float] | None = None  # log-probs of the probe text, nats: what replicas are compared by

    @property
    def failed(self) -> bool:
        return any(row.verdict is Verdict.FAIL for row in self.rows)

    def row(self, check: str) -> HealthRow | None:
        return next((row for row in self.rows if row.check == check), None)

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(row) | {"verdict": row.verdict.name} for row in self.rows]
        return {"url": self.url, "model": self.model, "rows": rows}


@dataclass(frozen=True, kw_only=True)
class HealthSettings:
    """How much is asked.

    Args:
        exact: the lengths are those of a run, which a server must be able to take. Otherwise prompts are shortened to
            what it takes.
    """

    prompt_tokens: int = 512
    response_tokens: int = 64
    samples: int = 8  # of one prompt
    in_flight: int = 16
    timeout_s: float = 60.0
    exact: bool = False
