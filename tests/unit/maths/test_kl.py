"""KL estimators: values by hand, and the gradient each has in expectation."""

import math

import pytest
import torch

from opd.maths.kl import kl_estimate
from tests.unit.maths import enumerated


def test_hand_worked():
    logprobs, other = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)
    assert kl_estimate(logprobs, other, "k1").tolist() == [0.5]
    assert kl_estimate(logprobs, other, "k2").tolist() == [0.125]
    assert kl_estimate(logprobs, other, "k3").tolist() == pytest.approx([math.exp(-0.5) - 1 + 0.5], abs=1e-15)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased_as_a_number(kind):
    student, other = enumerated.student(), enumerated.logits(2)
    kl_T = kl_estimate(enumerated.token_logprobs(student), enumerated.token_logprobs(other), kind)
    got = enumerated.expected(kl_T, student)
    torch.testing.assert_close(got, (enumerated.reach(student) * enumerated.kl_of_rows(student, other)).sum())


def expected_gradient(kind):
    student, other = enumerated.student(), enumerated.logits(2)
    kl_T = kl_estimate(enumerated.token_logprobs(student), enumerated.token_logprobs(other), kind)
    return enumerated.gradient(enumerated.expected(kl_T, student), student), student, other


def test_k1_has_no_gradient():
    assert expected_gradient("k1")[0].abs().max() < 1e-12


def test_k2_has_the_gradient_of_the_reverse_kl():
    got, student, other = expected_gradient("k2")
    exact = (enumerated.reach(student) * enumerated.kl_of_rows(student, other)).sum()
    enumerated.assert_same_gradient(got, enumerated.gradient(exact, student))


@pytest.mark.parametrize("kind", ["k3", "low_var_kl"])
def test_k3_has_the_gradient_of_the_forward_kl(kind):
    got, student, other = expected_gradient(kind)
    exact = (enumerated.reach(student) * enumerated.kl_of_rows(other, student)).sum()
    enumerated.assert_same_gradient(got, enumerated.gradient(exact, student))
    assert (got - expected_gradient("k2")[0]).abs().max() > 1e-2, "the two directions differ"


def test_k3_stays_finite_where_exp_would_overflow():
    logprobs = torch.tensor([-300.0], requires_grad=True)
    kl = kl_estimate(logprobs, torch.tensor([-1.0]), "k3")
    kl.sum().backward()
    assert torch.isfinite(kl).all() and logprobs.grad.tolist() == [1.0]


def test_no_gradient_for_the_other_model():
    other = torch.tensor([-1.0], requires_grad=True)
    assert not kl_estimate(torch.tensor([-2.0]), other, "k2").requires_grad


def test_unknown_kind():
    with pytest.raises(ValueError, match="'k4' is no KL estimator: give one of k1, k2, k3, low_var_kl"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
