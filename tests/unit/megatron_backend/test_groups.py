"""Sizes of the parallel layout."""

from __future__ import annotations

import pytest

from opd.megatron_backend.groups import ParallelSizes

pytestmark = pytest.mark.unit


def test_data_parallel_size_is_what_is_left() -> None:
    assert ParallelSizes(tp=2, pp=2, cp=1).dp(16) == 4
    assert ParallelSizes().dp(1) == 1


@pytest.mark.parametrize("world_size", [1, 6])
def test_a_world_that_does_not_fit_is_refused(world_size: int) -> None:
    with pytest.raises(ValueError, match=rf"{world_size} training ranks do not divide into model copies of 4 ranks"):
        ParallelSizes(tp=2, cp=2).dp(world_size)
