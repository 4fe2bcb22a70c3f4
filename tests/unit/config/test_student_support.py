"""Pieces in which a served teacher is asked about the student's own ids, and what they move."""

from __future__ import annotations

import pytest

from opd.config import student_support
from opd.config.student_support import distinct_ids, positions_per_request, support_cost

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("length", [1024, 4096, 16384, 131072])
@pytest.mark.parametrize("count", [1, 4, 16])
def test_no_other_size_moves_much_less(monkeypatch: pytest.MonkeyPatch, length: int, count: int) -> None:
    chosen = positions_per_request(length, count)
    moved = {}
    for size in (32, 48, 64, 96, 128, 192, 256, 512, chosen):
        monkeypatch.setattr(student_support, "positions_per_request", lambda *_, size=size: size)
        cost = support_cost(prompt=0, response=length, count=count)
        moved[size] = cost.sent + cost.answered
    assert moved[chosen] < 1.03 * min(moved.values())


def test_the_bytes_of_one_answer_by_hand() -> None:
    cost = support_cost(prompt=10, response=40, count=2)
    first, last = distinct_ids(32, 2), distinct_ids(8, 2)
    assert cost.requests == 2
    assert cost.sent == pytest.approx((42 + 50 + first + last) * 7)
    assert cost.answered == pytest.approx((32 * first + 8 * last) * 33)
    assert distinct_ids(1, 16) == 16
    assert support_cost(prompt=10, response=0, count=2).requests == 0
