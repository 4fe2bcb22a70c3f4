"""Vocabulary-parallel divergences: values, gradients and diagnostics of 2 and 3 ranks are those of one process."""

import pytest

from tests.dist.launch import launch

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("ranks", [2, 3])
def test_equal_to_one_process_for_every_kind_and_support(ranks):
    results = launch("tests.dist.divergence_workers:run", ranks=ranks, arguments={"megatron": ranks == 2})
    for differences in results:
        assert len(differences) == 3 * (2 * 5 + 1) + 1 + (2 if ranks == 2 else 0)
        for name, difference in differences.items():
            assert difference < (1e-5 if name.startswith("megatron") else 1e-12), name
