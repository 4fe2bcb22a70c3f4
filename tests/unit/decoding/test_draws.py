import numpy as np
import pytest
import torch

from opd.decoding.draws import request_noise, sample_tokens, truncate
from opd.types import SamplingParams


def test_frequencies_match_the_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    draws = 200_000
    uniforms = torch.rand(draws, dtype=torch.float64)
    ids, logprobs = sample_tokens(logits.expand(draws, -1), uniforms, SamplingParams(temperature=0.7))
    want = (logits / 0.7).softmax(-1)
    got = torch.bincount(ids, minlength=4) / draws
    assert (got - want).abs().max() < 4 * (0.25 / draws) ** 0.5  # four standard deviations of a frequency
    assert got[3] == 0
    torch.testing.assert_close(logprobs, (logits / 0.7).log_softmax(-1)[ids])


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_never_pick_an_impossible_token(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    ids, _ = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), SamplingParams())
    assert ids.item() == (1 if uniform == 0 else 2)


def test_greedy_is_the_argmax_with_its_temperature_1_logprob():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    ids, logprobs = sample_tokens(logits, torch.tensor([0.99]), SamplingParams(temperature=0))
    assert ids.tolist() == [1]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 1])


def test_logprobs_are_not_renormalised_by_truncation():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    _, logprobs = sample_tokens(logits, torch.tensor([0.5]), SamplingParams(top_k=1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 0])


def test_top_k_and_top_p_by_hand():
    logprobs = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    kept = lambda **limits: torch.isfinite(truncate(logprobs, **limits))[0].tolist()  # noqa: E731
    assert kept(top_k=2, top_p=1.0) == [True, False, True, False]
    assert kept(top_k=-1, top_p=0.5) == [True, False, False, False]
    assert kept(top_k=-1, top_p=0.6) == [True, False, True, False]
    assert kept(top_k=-1, top_p=1e-9) == [True, False, False, False]
    assert kept(top_k=9, top_p=1.0) == [True] * 4


def test_noise_belongs_to_the_request():
    assert request_noise(1, 2, 5).tolist() == request_noise(1, 2, 9)[:5].tolist()
    assert request_noise(1, 2, 5).tolist() != request_noise(1, 3, 5).tolist()
    assert request_noise(1, 2, 5).tolist() != request_noise(2, 2, 5).tolist()
    assert request_noise(1, 2, 5).tolist() != request_noise(1, 2, 5, stream=1).tolist()
    many = np.concatenate([request_noise(42, key, 50, stream=key % 3) for key in range(400)])
    assert abs(many.mean().item() - 0.5) < 0.01 and abs(many.var().item() - 1 / 12) < 0.003
