"""Spans by hand."""

import pytest
import torch

from opd.maths.penalty import subtract_reverse_kl
from opd.maths.spans import spans_of

LENGTHS = [4, 3]
SPAN_T = torch.tensor([0, 0, 1, -1, 0, 1, 1])  # the second sample starts anew
VALUES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])


def test_sums_and_their_places():
    spans = spans_of(SPAN_T, torch.ones(7, dtype=torch.bool), LENGTHS)
    assert spans.of_token_T.tolist() == [0, 0, 1, 2, 3, 4, 4]
    assert spans.per_sample == [3, 2]
    sums_C = spans.sums(VALUES)
    assert sums_C.tolist() == [3.0, 4.0, 0.0, 16.0, 96.0]
    assert spans.at_last_token(sums_C).tolist() == [0.0, 3.0, 4.0, 0.0, 16.0, 0.0, 96.0]


def test_the_same_number_in_two_samples_is_two_spans():
    spans = spans_of(torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool), [1, 1])
    assert spans.sums(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_a_span_that_lacks_a_token_has_no_sum():
    counts_T = torch.tensor([True, False, True, True, True, True, True])
    assert spans_of(SPAN_T, counts_T, LENGTHS).sums(VALUES).tolist() == [0.0, 4.0, 0.0, 16.0, 96.0]


def test_misaligned_lengths_are_refused():
    with pytest.raises(ValueError, match="samples have 6"):
        spans_of(SPAN_T, torch.ones(7, dtype=torch.bool), [4, 2])


def subtract(**settings):
    return subtract_reverse_kl(
        torch.zeros(7), VALUES, torch.zeros(7), (SPAN_T >= 0).float(), coef=1.0, response_lengths=LENGTHS,
        span_T=SPAN_T, **settings,
    )  # fmt: skip


def test_every_token_of_a_span_pays_the_whole_of_it():
    advantages_T, reverse_kl_T = subtract()
    assert (-advantages_T).tolist() == [3.0, 3.0, 4.0, 0.0, 16.0, 96.0, 96.0]
    assert reverse_kl_T.tolist() == [0.0, 3.0, 4.0, 0.0, 16.0, 0.0, 96.0]


def test_clip_and_discount_count_spans():
    advantages_T, reverse_kl_T = subtract(clip=20.0, discount=0.5)
    assert (-advantages_T).tolist() == [5.0, 5.0, 4.0, 0.0, 26.0, 20.0, 20.0]
    assert float(reverse_kl_T.sum()) == 119.0  # not clipped, each span once


@pytest.mark.parametrize("discount", [0.0, 0.7])
def test_spans_of_one_token_are_tokens(discount):
    values = torch.randn(7, generator=torch.Generator().manual_seed(0))
    arguments = (torch.ones(7), values, -values, torch.tensor([1.0, 1, 0, 1, 1, 1, 1]))
    settings = {"coef": 0.3, "clip": 1.0, "discount": discount, "response_lengths": LENGTHS}
    plain = subtract_reverse_kl(*arguments, **settings)
    spans = subtract_reverse_kl(*arguments, **settings, span_T=torch.tensor([0, 1, 2, 3, 0, 1, 2]))
    for got, want in zip(spans, plain, strict=True):
        assert torch.equal(got, want)
