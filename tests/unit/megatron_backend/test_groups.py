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


def test_experts_need_ranks_of_their_own_number() -> None:
    assert ParallelSizes(tp=2, ep=2).dp(4) == 2
    assert ParallelSizes(tp=2, ep=4, etp=1).dp(4) == 2
    with pytest.raises(
        ValueError, match=r"6 training ranks do not divide into sets of experts of 4 ranks .* --expert-m"
    ):
        ParallelSizes(tp=2, ep=2).dp(6)


def test_a_second_division_takes_the_place_of_the_first_and_gives_it_back(single_process: None) -> None:
    from megatron.core import parallel_state as mpu

    from opd.megatron_backend.groups import Layout

    first = mpu.get_tensor_model_parallel_group(), mpu.get_data_parallel_group()
    layout = Layout(ParallelSizes())
    assert (mpu.get_tensor_model_parallel_group(), mpu.get_data_parallel_group()) == first
    with pytest.raises(KeyError), layout.in_use():
        second = mpu.get_tensor_model_parallel_group(), mpu.get_data_parallel_group()
        raise KeyError
    assert not set(second) & set(first)
    assert (mpu.get_tensor_model_parallel_group(), mpu.get_data_parallel_group()) == first
    with pytest.raises(ValueError, match="1 training ranks do not divide into model copies of 2 ranks"):
        Layout(ParallelSizes(tp=2))
