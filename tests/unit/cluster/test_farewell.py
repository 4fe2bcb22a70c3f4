"""How long a run over Ray goes on after one of its ranks has failed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from opd.cluster.failures import EndedRank
from opd.cluster.processes import Report
from opd.cluster.ray_driver import FAREWELL_SECONDS, REPORT_SECONDS, _Until
from tests.unit.cluster.test_failures import crashed, ended

pytestmark = pytest.mark.unit

SAID = Report(outcome="refused", message="the judge is gone", at=0.0)


@pytest.mark.parametrize(
    ("ranks", "seconds"),
    [
        ([ended(1, 1, report=SAID)], REPORT_SECONDS),  # rank 0 writes its report meanwhile
        ([ended(1, 1, report=SAID), ended(0, 1, report=SAID)], FAREWELL_SECONDS),
        ([ended(0, 2, report=SAID)], FAREWELL_SECONDS),  # refused before the ranks have met
        ([ended(1, -9)], FAREWELL_SECONDS),
        ([ended(1, 1, report=SAID), ended(2, 1, report=crashed(1.0))], FAREWELL_SECONDS),
    ],
)
def test_rank_0_gets_time_for_its_report_and_nobody_else(ranks: list[EndedRank], seconds: float) -> None:
    now = 100.0
    crew = SimpleNamespace(ended=lambda: ranks)
    until = _Until(crew, SimpleNamespace(requested=False), now=lambda: now)
    assert not until()
    now += seconds - 0.5
    assert not until()
    now += 1.0
    assert until()


def test_a_run_without_a_failure_goes_on() -> None:
    crew = SimpleNamespace(ended=lambda: [ended(1, 0)])
    assert not _Until(crew, SimpleNamespace(requested=False), now=lambda: 1e9)()
