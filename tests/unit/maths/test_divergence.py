"""Values and gradients of `divergence`, against autograd through a plain implementation, against exact enumeration and
against TRL's numbers."""

import pytest
import torch

from opd.maths import divergence as module
from opd.maths.divergence import divergence, divergence_and_grad, sparse_divergence_and_grad
from opd.maths.logprobs import token_logprobs

V, K = 11, 3
KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), *[("gkd", b) for b in (0.0, 0.25, 0.5, 1.0)]]
SUPPORTS = [(None, "teacher"), *[(k, s) for k in (K, V) for s in ("teacher", "student", "union")]]
kinds = pytest.mark.parametrize("kind, beta", KINDS)
temperatures = pytest.mark.parametrize("temperature", [1.0, 2.0])
supports = pytest.mark.parametrize("top_k, support", SUPPORTS)


def logits(rows=7, columns=V, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=dtype) * 3 for _ in range(2)]


def kl(p, q):
    return torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log()), 0.0).sum(-1)


def plain(student, teacher, kind, beta, temperature=1.0, top_k=None, support="teacher"):
    s, t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    if top_k is not None:
        chosen = {"teacher": [t], "student": [s], "union": [s, t]}[support]
        kept = torch.stack([torch.zeros_like(s).scatter(1, p.topk(top_k).indices, 1.0) for p in chosen]).amax(0)
        s, t = (torch.cat([p * kept, (p * (1 - kept)).sum(-1, keepdim=True)], 1) for p in (s, t))
    if kind == "reverse_kl" or (kind == "gkd" and beta == 1):
        return kl(s, t)
    if kind == "forward_kl" or (kind == "gkd" and beta == 0):
        return kl(t, s)
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


@kinds
@temperatures
@supports
def test_value_and_gradient_equal_autograd_through_the_plain_form(kind, beta, temperature, top_k, support):
    student, teacher = logits()
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    ours, twin = student.clone().requires_grad_(), student.clone().requires_grad_()
    got = divergence(ours, teacher, kind=kind, beta=beta, temperature=temperature, top_k=top_k, support=support)
    want = plain(twin, teacher, kind, beta, temperature, top_k, support)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    torch.testing.assert_close(ours.grad, twin.grad, atol=1e-10, rtol=0)


@kinds
@temperatures
@supports
def test_gradcheck(kind, beta, temperature, top_k, support):
    student, teacher = logits(rows=2)
    options = {"kind": kind, "beta": beta, "temperature": temperature, "top_k": top_k, "support": support}
    assert torch.autograd.gradcheck(lambda x: divergence(x, teacher, **options), (student.requires_grad_(),))


@kinds
def test_the_gradient_is_the_enumerated_expectation(kind, beta):
    """Policy-gradient form: sum over tokens a of s(a) * (dD / ds(a)) * grad log s(a), each token enumerated."""
    student, teacher = (x[:1] for x in logits())
    ours = student.clone().requires_grad_()
    divergence(ours, teacher, kind=kind, beta=beta).sum().backward()
    s, t = student.softmax(-1)[0], teacher.softmax(-1)[0]
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    name = ends.get(beta, kind) if kind == "gkd" else kind
    m = beta * t + (1 - beta) * s
    slope = {"reverse_kl": (s / t).log(), "forward_kl": -t / s, "gkd": (1 - beta) * (s / m).log()}[name]
    want = torch.zeros(V, dtype=torch.float64)
    for token in range(V):
        score = -s.clone()
        score[token] += 1
        want += s[token] * slope[token] * score
    assert (ours.grad[0] - want).abs().max() < 1e-12


def test_reverse_kl_is_the_expectation_of_the_sampled_penalty():
    student, teacher = logits()
    every = torch.arange(V)
    for row in range(3):
        k1 = token_logprobs(student[row].expand(V, -1), every) - token_logprobs(teacher[row].expand(V, -1), every)
        want = (student[row].softmax(-1) * k1).sum()
        got = divergence(student[row : row + 1], teacher[row : row + 1], kind="reverse_kl")[0]
        assert got == pytest.approx(want.item(), abs=1e-12)


# What TRL 1.16.0's GKDTrainer.generalized_jsd_loss (trl/experimental/gkd/gkd_trainer.py) gives for the logits of
# `trl_logits`: reduction="none" summed over the vocabulary, and the first three gradients of "batchmean" with a batch
# of one. Its beta is ours. It divides both logits by the temperature and does not multiply by T^2. "batchmean" divides
# by the number of unmasked tokens when given labels and by the batch size, not the tokens, without.
TRL = {
    (0, 1): ([1.5898322178, 2.7822802597, 2.5765107431], [-0.2248625217, 0.2389719241, 0.0974334701]),
    (0, 2): ([0.5475797017, 0.9923434637, 0.9478643615], [-0.0672900857, 0.0711478632, 0.0632150685]),
    (0.25, 1): ([0.1869544017, 0.3689892031, 0.326311126], [-0.0225112755, 0.0188670127, 0.0131055627]),
    (0.25, 2): ([0.0893379096, 0.1730057129, 0.1600837811], [-0.0113815594, 0.0098173957, 0.011015564]),
    (1, 1): ([0.8475889973, 3.5836162644, 2.8466315146], [-0.0714439809, 0.0348522484, 0.2212697377]),
    (1, 2): ([0.4397356832, 1.2142404222, 1.0387262613], [-0.0537838104, 0.0285615698, 0.0953408401]),
}


def trl_logits():
    positions = torch.arange(3 * 7, dtype=torch.float64).reshape(3, 7)
    return 3 * torch.sin(1.3 * positions), 2 * torch.cos(0.7 * positions * positions)


@pytest.mark.parametrize("beta, temperature", TRL)
def test_equal_to_trl(beta, temperature):
    student, teacher = trl_logits()
    student.requires_grad_()
    got = divergence(student, teacher, kind="gkd", beta=beta, temperature=temperature)
    got.sum().backward()
    values, gradient = TRL[beta, temperature]
    assert got.tolist() == pytest.approx(values, abs=1e-9)
    assert student.grad[0, :3].tolist() == pytest.approx(gradient, abs=1e-9)


@kinds
def test_equal_distributions_have_no_divergence_and_no_gradient(kind, beta):
    student, _ = logits()
    shifted = (student + 5).requires_grad_()  # a constant per row changes no distribution
    value = divergence(shifted, student, kind=kind, beta=beta)
    value.sum().backward()
    assert value.abs().max() < 1e-12 and shifted.grad.abs().max() < 1e-12


def test_the_ends_of_gkd_are_the_kls_by_definition():
    student, teacher = logits()
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        assert torch.equal(divergence(student, teacher, kind="gkd", beta=beta), divergence(student, teacher, kind=kind))
    # ... while the formula itself vanishes there
    assert divergence(student, teacher, kind="gkd", beta=1e-9).max() < 1e-6


@pytest.mark.parametrize("padding", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@kinds
@pytest.mark.parametrize("top_k, support", [(None, "teacher"), (K, "union"), (V + 2, "student")])
def test_padded_columns_add_nothing(padding, temperature, kind, beta, top_k, support):
    student, teacher = logits(dtype=torch.float32)
    options = {"kind": kind, "beta": beta, "temperature": temperature, "support": support}
    pad = torch.full((7, 2), padding)
    padded = torch.cat([student, pad], 1).requires_grad_()
    got = divergence(padded, torch.cat([teacher, pad], 1), top_k=top_k, **options)
    got.sum().backward()
    twin = student.clone().requires_grad_()
    want = divergence(twin, teacher, top_k=None if top_k is None else min(top_k, V), **options)
    want.sum().backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.grad[:, :V], twin.grad, atol=1e-5, rtol=1e-5)
    assert torch.equal(padded.grad[:, V:], torch.zeros(7, 2))


def test_underflowing_probabilities_give_no_nan():
    student = torch.tensor([[0.0, -200.0, -90.0, -1e4]]).requires_grad_()
    teacher = torch.tensor([[-300.0, 0.0, -95.0, -1e5]])
    for kind, beta in KINDS:
        student.grad = None
        value = divergence(student, teacher, kind=kind, beta=beta)
        value.sum().backward()
        assert torch.isfinite(value).all() and torch.isfinite(student.grad).all(), kind
    assert divergence(student, teacher, kind="reverse_kl").item() == pytest.approx(300, rel=1e-5)
    assert divergence(student, teacher, kind="gkd", beta=0.5).item() == pytest.approx(
        0.693147, rel=1e-5
    )  # at most ln 2


def test_mass_on_an_impossible_token_is_infinitely_far():
    student, teacher = logits()
    teacher[0, 4] = float("-inf")
    value = divergence(student, teacher, kind="reverse_kl")
    assert value[0] == float("inf") and torch.isfinite(value[1:]).all()
    assert torch.isfinite(divergence(student, teacher, kind="forward_kl")).all()
    assert divergence(teacher, student, kind="forward_kl")[0] == float("inf")


@pytest.mark.parametrize("top_k", [None, K])
def test_the_size_of_blocks_and_chunks_changes_nothing(monkeypatch, top_k):
    student, teacher = logits(rows=10)
    results = []
    for block, chunk in ((1, 3), (4 * V, 4), (10**6, 100)):
        monkeypatch.setattr(module, "_CPU_BLOCK", block)
        monkeypatch.setattr(module, "_CHUNK", chunk)
        leaf = student.clone().requires_grad_()
        value = divergence(leaf, teacher, kind="gkd", beta=0.25, top_k=top_k, support="union")
        value.sum().backward()
        results.append((value.detach(), leaf.grad))
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0], atol=1e-14, rtol=0)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-14, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bfloat16_logits_are_compared_in_float32(temperature):
    student, teacher = (x.bfloat16() for x in logits(columns=300))
    leaf, twin = student.clone().requires_grad_(), student.float().requires_grad_()
    got = divergence(leaf, teacher, kind="gkd", temperature=temperature)
    want = divergence(twin, teacher.float(), kind="gkd", temperature=temperature)
    assert got.dtype == torch.float32 and leaf.grad is None
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    got.sum().backward()
    want.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(leaf.grad.float(), twin.grad, atol=1e-6, rtol=1e-2)


def test_neither_input_is_changed_and_the_teacher_gets_no_gradient():
    student, teacher = logits()
    before = student.clone(), teacher.clone()
    teacher.requires_grad_()
    divergence(student.requires_grad_(), teacher, kind="gkd").sum().backward()
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    assert teacher.grad is None


def test_the_gradient_may_take_the_place_of_the_logits():
    student, teacher = logits()
    want = divergence_and_grad(student, teacher, kind="gkd").grad_CV
    got = divergence_and_grad(student, teacher, kind="gkd", out=student)
    assert got.grad_CV is student and torch.equal(student, want)


def test_diagnostics():
    student, teacher = logits(rows=20)
    got = divergence_and_grad(student, teacher, kind="reverse_kl", temperature=2.0)
    s, t = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    torch.testing.assert_close(got.student_entropy_C, -(s * s.log()).sum(-1))
    torch.testing.assert_close(got.teacher_entropy_C, -(t * t.log()).sum(-1))
    agree = (s.argmax(-1) == t.argmax(-1)).double()
    assert 0 < agree.sum() < 20 and torch.equal(got.top1_agree_C, agree)
    assert not got.tail_mass_C.any()
    kept = divergence_and_grad(student, teacher, kind="reverse_kl", temperature=2.0, top_k=K, need_grad=False)
    torch.testing.assert_close(kept.tail_mass_C, 1 - s.gather(1, t.topk(K).indices).sum(-1))
    torch.testing.assert_close(kept.teacher_entropy_C, got.teacher_entropy_C)
    assert torch.equal(kept.top1_agree_C, agree) and kept.grad_CV is None


def test_no_rows():
    empty = torch.empty(0, 5, requires_grad=True)
    value = divergence(empty, torch.empty(0, 5), kind="gkd", top_k=2)
    value.sum().backward()
    assert value.shape == (0,) and empty.grad.shape == (0, 5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "jsd"}, "kind='jsd' is not a divergence: choose reverse_kl"),
        ({"beta": 1.5}, r"beta=1.5 must be in \[0, 1\]"),
        ({"beta": float("nan")}, "beta=nan must be"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": float("inf")}, "temperature=inf must be above 0 and finite"),
        ({"top_k": 0}, "top_k=0 must be a whole number of tokens, 1 or more"),
        ({"top_k": True}, "top_k=True must be"),
        ({"top_k": 12}, "top_k=12 must be at most the vocabulary, 11"),
        ({"support": "both"}, "support='both' must be one of teacher, student, union"),
    ],
)
def test_refusals(options, message):
    student, teacher = logits()
    with pytest.raises(ValueError, match=message):
        divergence(student, teacher, **{"kind": "gkd"} | options)


def test_refuses_shapes_that_do_not_match():
    with pytest.raises(ValueError, match=r"student logits \(2, 5\) and teacher logits \(2, 6\) must both be"):
        divergence(torch.zeros(2, 5), torch.zeros(2, 6), kind="gkd")
    with pytest.raises(ValueError, match="flatten batch and sequence"):
        divergence(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5), kind="gkd")
    with pytest.raises(ValueError, match="must be .rows, vocabulary., .rows, K."):
        sparse_divergence_and_grad(torch.zeros(2, 5), torch.zeros(2, 3).long(), torch.zeros(2, 2), kind="gkd")
