"""A divergence that a user wrote gives what the built-in one gives, and what it returns is checked."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd.errors import ResultError
from opd.maths.divergence import divergence
from opd.maths.divergence_custom import DivergenceFn, check_function, custom_divergence_and_grad
from opd.maths.head import OutputHead
from opd.maths.head_divergence import DIAGNOSTICS, head_divergence

pytestmark = pytest.mark.unit

ROWS, HIDDEN, COLUMNS, VOCAB = 10, 6, 13, 11  # two columns of padding


def reverse_terms(student: Tensor, teacher: Tensor) -> Tensor:
    return student.exp() * (student - teacher)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    middle = torch.logaddexp(student, teacher) - math.log(2.0)
    return 0.5 * (teacher.exp() * (teacher - middle) + student.exp() * (student - middle))


BUILT_IN: list[tuple[DivergenceFn, str]] = [
    (reverse_terms, "reverse_kl"),
    (lambda s, t: reverse_terms(s, t).sum(dim=-1), "reverse_kl"),
    (lambda s, t: t.exp() * (t - s), "forward_kl"),
    (jensen_shannon, "gkd"),
]


def inputs() -> tuple[OutputHead, Tensor, Tensor, Tensor]:
    """(head, hidden states, teacher's logits, weights of the rows), float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher = OutputHead(weight_VH=normal(COLUMNS, 4), vocab_size=VOCAB).logits(normal(ROWS, 4))
    head = OutputHead(weight_VH=normal(COLUMNS, HIDDEN).requires_grad_(), vocab_size=VOCAB)
    return head, normal(ROWS, HIDDEN).requires_grad_(), teacher, torch.rand(ROWS, generator=generator).double()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("function", "kind"), BUILT_IN)
def test_it_equals_the_built_in_one(function: DivergenceFn, kind: str, temperature: float) -> None:
    results = []
    for either in (function, kind):
        head, hidden, teacher, weights = inputs()
        loss, value, diagnostics = head_divergence(
            hidden, head, lambda rows, teacher=teacher: teacher[rows], weights, kind=either, temperature=temperature,
            chunk=4,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), value, *(diagnostics[n] for n in DIAGNOSTICS), hidden.grad, head.weight_VH.grad))
    for own, built_in in zip(*results, strict=True):
        torch.testing.assert_close(own, built_in, rtol=0, atol=1e-12)


def test_blocks_of_rows_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.maths.divergence._CPU_BLOCK", 3 * COLUMNS)
    _, _, teacher, _ = inputs()
    student = teacher.flip(0)[:, :VOCAB].clone().requires_grad_()
    found = custom_divergence_and_grad(student, teacher[:, :VOCAB], function=reverse_terms, real_columns=VOCAB)
    value = divergence(student, teacher[:, :VOCAB], kind="reverse_kl")
    (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(found.value_C, value.detach())
    torch.testing.assert_close(found.gradient(), gradient)


def test_a_row_without_weight_adds_nothing_even_where_it_is_infinite() -> None:
    head, hidden, teacher, weights = inputs()
    teacher[2, 4] = float("-inf")
    weights[2] = 0
    loss, value, _ = head_divergence(hidden, head, lambda rows: teacher[rows], weights, kind=reverse_terms)
    loss.backward()
    assert value[2] == float("inf") and torch.isfinite(loss)
    assert torch.isfinite(head.weight_VH.grad).all() and not hidden.grad[2].any() and hidden.grad[3].any()


def test_it_takes_whole_distributions() -> None:
    head, hidden, teacher, weights = inputs()
    with pytest.raises(ValueError, match="whole distributions"):
        head_divergence(hidden, head, lambda rows: teacher[rows], weights, kind=reverse_terms, top_k=3)
    few = teacher.topk(3)
    with pytest.raises(ValueError, match="whole distributions"):
        head_divergence(hidden, head, (few.indices, few.values), weights, kind=reverse_terms)


COMPLAINTS: list[tuple[Callable[[Tensor, Tensor], object], bool, str]] = [
    (lambda s, t: 0.5, False, "gave float: a tensor is needed"),
    (lambda s, t: reverse_terms(s, t).sum(), False, r"gave shape \[\] for log-probs \[3, 8\]"),
    (lambda s, t: reverse_terms(s, t)[:, :5], False, r"gave shape \[3, 5\]"),
    (lambda s, t: reverse_terms(s, t) / 0, False, "gave NaN or infinity"),
    (lambda s, t: (s - t).detach(), False, "does not depend on the student's"),
    (lambda s, t: reverse_terms(s, t) + (s - s).abs().sqrt(), False, "gradient of NaN or infinity"),
    (lambda s, t: reverse_terms(s, t) - reverse_terms(s, t).mean(dim=0), False, "one by one"),
    (lambda s, t: reverse_terms(s, t).sum(dim=-1), True, "part of the vocabulary"),
    (lambda s, t: reverse_terms(s, t) * s.amax(dim=-1, keepdim=True), True, "its own column alone"),
]


@pytest.mark.parametrize(("function", "by_columns", "complaint"), COMPLAINTS)
def test_what_cannot_be_used_is_said(function: DivergenceFn, by_columns: bool, complaint: str) -> None:
    with pytest.raises(ResultError, match=complaint):
        check_function(function, by_columns=by_columns)


@pytest.mark.parametrize("function", [reverse_terms, jensen_shannon])
def test_terms_by_columns_go_with_tensor_parallel_ranks(function: DivergenceFn) -> None:
    check_function(function, by_columns=True)
