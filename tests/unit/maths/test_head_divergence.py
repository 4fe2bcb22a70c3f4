"""The fused head + divergence against full logits and autograd."""

from dataclasses import dataclass

import pytest
import torch

from opd.maths.divergence import divergence, divergence_and_grad
from opd.maths.head_divergence import DIAGNOSTICS, head_divergence

R, H, V, VOCAB = 10, 6, 13, 11  # two columns of padding
CASES = [
    {"kind": "reverse_kl"},
    {"kind": "forward_kl", "temperature": 2.0},
    {"kind": "gkd", "beta": 0.25},
    {"kind": "gkd", "top_k": 3, "support": "union", "temperature": 2.0},
    {"kind": "reverse_kl", "top_k": 3, "support": "student"},
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@dataclass
class Head:
    weight_VH: torch.Tensor
    group: None = None

    def logits(self, hidden_CH):
        logits_CV = hidden_CH.to(self.weight_VH.dtype) @ self.weight_VH.t()
        if logits_CV.dtype == torch.bfloat16:
            logits_CV = logits_CV.float()
        logits_CV[:, VOCAB:] = torch.finfo(logits_CV.dtype).min
        return logits_CV


def inputs(dtype=torch.float64, teacher_hidden=9):
    """The teacher has another hidden size."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden, weight = normal(R, H).requires_grad_(), normal(V, H).requires_grad_()
    teacher = Head(normal(V, teacher_hidden)).logits(normal(R, teacher_hidden))
    weights = torch.rand(R, generator=g, dtype=torch.float64).to(teacher.dtype)
    return hidden, weight, teacher, weights


def reference(hidden, weight, teacher, weights, case):
    value = divergence(Head(weight).logits(hidden), teacher, **case)
    return (value * weights).sum(), value.detach()


@cases
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_loss_values_and_gradients_equal_full_logits(case, chunk):
    hidden, weight, teacher, weights = inputs()
    twin_hidden, twin_weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss, value, diagnostics = head_divergence(hidden, Head(weight), lambda i: teacher[i], weights, chunk=chunk, **case)
    want, want_value = reference(twin_hidden, twin_weight, teacher, weights, case)
    (3 * loss).backward()
    (3 * want).backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(value, want_value)
    torch.testing.assert_close(hidden.grad, twin_hidden.grad, atol=1e-12, rtol=0)
    torch.testing.assert_close(weight.grad, twin_weight.grad, atol=1e-12, rtol=0)
    assert not value.requires_grad and tuple(diagnostics) == DIAGNOSTICS
    chunked = divergence_and_grad(Head(weight).logits(hidden).detach(), teacher, **case)
    for name in DIAGNOSTICS:
        torch.testing.assert_close(diagnostics[name], getattr(chunked, f"{name}_C"))


def test_sparse_teacher():
    hidden, weight, teacher, weights = inputs()
    ids = teacher.topk(3).indices
    pair = ids, teacher.log_softmax(-1).gather(1, ids)
    loss, value, _ = head_divergence(hidden, Head(weight), pair, weights, kind="gkd", chunk=4)
    loss.backward()
    got = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    want, want_value = reference(hidden, weight, teacher, weights, {"kind": "gkd", "top_k": 3})
    want.backward()
    torch.testing.assert_close(value, want_value)
    torch.testing.assert_close(got[0], hidden.grad)
    torch.testing.assert_close(got[1], weight.grad)


def test_a_frozen_head_gets_no_gradient_and_costs_none(monkeypatch):
    hidden, weight, teacher, weights = inputs()
    head_divergence(hidden, Head(weight), lambda i: teacher[i], weights, kind="gkd")[0].backward()
    want = hidden.grad.clone()
    hidden.grad = None
    from opd.maths import head_divergence as module

    def refuse(self, weight_VH):
        raise AssertionError("made a [V, H] gradient for a frozen head")

    monkeypatch.setattr(module.WeightGradient, "__init__", refuse)
    frozen = Head(weight.detach())
    loss, _, _ = head_divergence(hidden, frozen, lambda i: teacher[i], weights, kind="gkd")
    loss.backward()
    torch.testing.assert_close(hidden.grad, want)
    with torch.no_grad():
        silent, _, _ = head_divergence(hidden, Head(weight), lambda i: teacher[i], weights, kind="gkd")
    assert not silent.requires_grad and silent == loss


def test_a_row_of_weight_0_adds_nothing_even_where_it_is_infinite():
    hidden, weight, teacher, weights = inputs()
    teacher[2, 4] = float("-inf")
    weights[2] = 0
    loss, value, _ = head_divergence(hidden, Head(weight), lambda i: teacher[i], weights, kind="reverse_kl", chunk=4)
    loss.backward()
    assert value[2] == float("inf") and torch.isfinite(loss)
    assert torch.isfinite(weight.grad).all() and not hidden.grad[2].any() and hidden.grad[3].any()


def test_bfloat16_weights_get_a_gradient_summed_in_float32():
    hidden, weight, teacher, weights = inputs(torch.bfloat16)
    loss, _, _ = head_divergence(hidden, Head(weight), lambda i: teacher[i], weights, kind="gkd", chunk=1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    twin = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    want, _ = reference(*twin, teacher, weights, {"kind": "gkd"})
    want.backward()
    torch.testing.assert_close(weight.grad.float(), twin[1].grad, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(hidden.grad.float(), twin[0].grad, atol=2e-2, rtol=2e-2)


def test_no_rows_still_take_part_in_the_graph():
    _, weight, _, _ = inputs()
    hidden = torch.empty(0, H, dtype=torch.float64, requires_grad=True)
    empty = torch.empty(0, V, dtype=torch.float64)
    loss, value, _ = head_divergence(hidden, Head(weight), lambda i: empty[i], torch.empty(0), kind="gkd")
    loss.backward()
    assert loss == 0 and value.shape == (0,) and hidden.grad.shape == (0, H) and not weight.grad.any()


def test_a_second_backward_pass_says_what_to_do():
    hidden, weight, teacher, weights = inputs()
    loss, _, _ = head_divergence(hidden, Head(weight), lambda i: teacher[i], weights, kind="gkd")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call it again"):
        loss.backward()


def test_refusals():
    hidden, weight, teacher, weights = inputs()
    head = Head(weight)
    with pytest.raises(ValueError, match="one weight per row"):
        head_divergence(hidden, head, lambda i: teacher[i], weights[:3], kind="gkd")
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        head_divergence(hidden, head, lambda i: teacher[i], weights, kind="gkd", chunk=0)
    with pytest.raises(ValueError, match="10 rows of hidden states but teacher ids for 2"):
        head_divergence(hidden, head, (torch.zeros(2, 1).long(), torch.zeros(2, 1)), weights, kind="gkd")
    with pytest.raises(ValueError, match="beta=2 must be"):
        head_divergence(hidden, head, lambda i: teacher[i], weights, kind="gkd", beta=2)
