"""Which answers are saved: marked by number before they are scored; one that cannot be learned from is replaced."""

from __future__ import annotations

import pytest

from opd.saved_answers import choose, mark_beforehand, spread
from opd.types import Sample, SampleStatus


def samples(count: int, *, first: int = 0, aborted: tuple[int, ...] = ()) -> list[Sample]:
    common = {"group_index": 0, "prompt": "", "tokens": [1, 2], "response_length": 1}
    status = {True: SampleStatus.ABORTED, False: SampleStatus.COMPLETED}
    return [Sample(index=first + i, status=status[i in aborted], **common) for i in range(count)]


def saved(answers: list[Sample]) -> list[int]:
    return [sample.index for sample in answers if sample.saved]


@pytest.mark.parametrize(("count", "places"), [(0, []), (4, [0, 4, 8, 12]), (5, [0, 3, 6, 9, 12]), (99, [*range(16)])])
def test_marks_are_spread_over_every_rollout(count: int, places: list[int]) -> None:
    for first in (0, 160):
        answers = samples(16, first=first)
        mark_beforehand(reversed(answers), count, rollout_size=16)
        assert saved(answers) == [first + place for place in places]


def test_an_answer_that_cannot_be_learned_from_is_replaced() -> None:
    answers = samples(16, aborted=(0, 4))
    mark_beforehand(answers, 4, rollout_size=16)
    choose(answers, 4)
    assert saved(answers) == [1, 8, 9, 12]  # those marked before that are left, and two of the others


def test_no_more_are_saved_than_asked_for() -> None:
    answers = samples(8)
    for sample in answers:
        sample.saved = True
    choose(answers, 2)
    assert saved(answers) == [0, 4] and spread(answers, 99) == answers
