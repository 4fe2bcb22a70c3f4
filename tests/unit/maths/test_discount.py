import pytest
import torch

from opd.maths.discount import discounted_sums


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_equals_the_sum_within_each_sample(discount):
    torch.manual_seed(0)
    values, lengths = torch.randn(8, dtype=torch.float64), [3, 1, 4]
    want, start = [], 0
    for length in lengths:
        part = values[start : start + length].tolist()
        want += [sum(discount**k * x for k, x in enumerate(part[t:])) for t in range(length)]
        start += length
    assert discounted_sums(values, lengths, discount=discount).tolist() == pytest.approx(want, abs=1e-12)


def test_leaves_its_argument_alone():
    values = torch.ones(4)
    assert discounted_sums(values, [4], discount=1.0).tolist() == [4, 3, 2, 1]
    assert values.tolist() == [1, 1, 1, 1]


def test_a_masked_token_takes_no_time():
    sums = discounted_sums(
        torch.tensor([1.0, 7.0, 2.0, 9.0]), [3, 1], discount=0.5, mask_T=torch.tensor([1.0, 0.0, 1.0, 0.0])
    )
    assert sums.tolist() == [2.0, 0.0, 2.0, 0.0]


def test_refusals():
    with pytest.raises(ValueError, match="add up to 3 for 2 tokens"):
        discounted_sums(torch.zeros(2), [3], discount=0.5)
    with pytest.raises(ValueError, match="discount=1.5 must be in"):
        discounted_sums(torch.zeros(2), [2], discount=1.5)
