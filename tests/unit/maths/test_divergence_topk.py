"""What the top-k + tail form promises beyond being computed right (test_divergence)."""

import pytest
import torch

from opd.maths.divergence import divergence, divergence_and_grad, sparse_divergence_and_grad

V, K = 50, 4
KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("gkd", 0.25), ("gkd", 0.5)]
kinds = pytest.mark.parametrize("kind, beta", KINDS)
supports = pytest.mark.parametrize("support", ["teacher", "student", "union"])


def logits(dtype=torch.float64, spread=3.0):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(30, V, generator=generator, dtype=dtype) * spread for _ in range(2)]


@kinds
@supports
def test_a_lower_bound_that_rises_to_the_full_value(kind, beta, support):
    student, teacher = logits()
    full = divergence(student, teacher, kind=kind, beta=beta)
    last = torch.zeros(30, dtype=torch.float64)
    for k in (1, K, 20, V):
        value = divergence(student, teacher, kind=kind, beta=beta, top_k=k, support=support)
        assert (value >= last - 1e-12).all() and (value <= full + 1e-12).all()
        last = value
    torch.testing.assert_close(last, full, atol=1e-12, rtol=0)
    assert (divergence(student, teacher, kind=kind, beta=beta, top_k=1, support=support) < full - 0.01).any()


@kinds
def test_all_tokens_kept_is_the_full_form_in_float32_too(kind, beta):
    student, teacher = logits(torch.float32)
    full = divergence_and_grad(student, teacher, kind=kind, beta=beta)
    kept = divergence_and_grad(student, teacher, kind=kind, beta=beta, top_k=V)
    torch.testing.assert_close(kept.value_C, full.value_C, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept.grad_CV, full.grad_CV, atol=1e-6, rtol=1e-5)
    assert not kept.tail_mass_C.any()


@kinds
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_a_server_s_log_probs_give_what_the_logits_give(kind, beta, dtype, tolerance):
    student, teacher = logits(dtype)
    ids = teacher.topk(K).indices
    logprobs = (teacher / 2).log_softmax(-1).gather(1, ids)
    padded = torch.cat([torch.full((30, 1), -1), ids, torch.full((30, 2), -1)], 1)
    noise = torch.full((30, 1), float("nan"), dtype=dtype)  # whatever stands at an unused place
    got = sparse_divergence_and_grad(
        student, padded, torch.cat([noise, logprobs, noise, noise], 1), kind=kind, beta=beta, temperature=2.0
    )
    want = divergence_and_grad(student, teacher, kind=kind, beta=beta, temperature=2.0, top_k=K)
    torch.testing.assert_close(got.value_C, want.value_C, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.grad_CV, want.grad_CV, atol=tolerance, rtol=tolerance)
    for name in ("student_entropy_C", "top1_agree_C", "tail_mass_C"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=tolerance, rtol=tolerance)
    t = logprobs.exp()
    tail = 1 - t.sum(-1)
    torch.testing.assert_close(
        got.teacher_entropy_C, -(t * logprobs).sum(-1) - tail * tail.log(), atol=tolerance, rtol=tolerance
    )


@kinds
def test_a_server_that_lists_every_token_gives_the_full_divergence(kind, beta):
    student, teacher = logits()
    ids = teacher.argsort(descending=True)
    got = sparse_divergence_and_grad(student, ids, teacher.log_softmax(-1).gather(1, ids), kind=kind, beta=beta)
    want = divergence_and_grad(student, teacher, kind=kind, beta=beta)
    torch.testing.assert_close(got.value_C, want.value_C, atol=1e-10, rtol=0)
    torch.testing.assert_close(got.grad_CV, want.grad_CV, atol=1e-10, rtol=0)


@kinds
def test_kept_mass_that_rounds_above_one_stays_finite(kind, beta):
    student = torch.tensor([[30.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    ids = torch.tensor([[0, 1], [0, 1]])
    logprobs = torch.tensor([[1e-7, -25.0], [-0.6931471, -0.6931470]])
    got = sparse_divergence_and_grad(student, ids, logprobs, kind=kind, beta=beta)
    assert torch.isfinite(got.value_C).all() and torch.isfinite(got.grad_CV).all()
    assert got.value_C[1] > 0.1  # half of the student's mass lies where the teacher has none left


@kinds
def test_the_tail_bucket_moves_tokens_that_are_not_kept(kind, beta):
    """Without the bucket, and with its value clamped at 0, a student that has too much mass outside the teacher's
    favourites gets no loss and no gradient there."""
    teacher = torch.full((1, 8), -9.0, dtype=torch.float64)
    teacher[0, 0] = 0.0
    student = torch.zeros(1, 8, dtype=torch.float64)
    got = divergence_and_grad(student, teacher, kind=kind, beta=beta, top_k=1)
    s, t = student.softmax(-1)[0, 0], teacher.softmax(-1)[0, 0]
    without_tail = s * (s / t).log()
    assert without_tail < 0 < got.value_C.item()
    assert (got.grad_CV[0, 1:] > 0.005).all() and got.grad_CV[0, 0] < 0
    assert got.grad_CV.sum().abs() < 1e-12


def test_a_student_whose_tail_is_far_too_small_still_feels_it():
    """1 - (almost 1) in float32 would see a tail of 0 or 6e-8 where it is 2e-13."""
    student = torch.tensor([[30.0, 0.0, 0.0]])
    teacher = torch.zeros(1, 3)
    got = divergence_and_grad(student, teacher, kind="forward_kl", top_k=1, support="student")
    want = divergence_and_grad(student.double(), teacher.double(), kind="forward_kl", top_k=1, support="student")
    assert want.value_C.item() > 18
    torch.testing.assert_close(got.value_C.double(), want.value_C, atol=0, rtol=1e-5)
    torch.testing.assert_close(got.grad_CV.double(), want.grad_CV, atol=1e-6, rtol=1e-5)


# TRL 1.16.0's IWOPDTrainer.generalized_jsd_loss (trl/experimental/iw_opd/iw_opd_trainer.py) with top_k=2,
# add_tail=True, temperature=2, reduction="none", summed over the buckets. Its support follows beta: the teacher's at 0,
# the student's at 1, their union between.
TRL_TOP_2 = {
    (0, "teacher"): [0.3960274225, 0.3652678027, 0.412817148],
    (0.25, "union"): [0.0633018737, 0.1195339391, 0.1559423965],
    (1, "student"): [0.1390721401, 0.9021724904, 0.9377478106],
}


@pytest.mark.parametrize("beta, support", TRL_TOP_2)
def test_equal_to_trl_s_top_k_with_tail(beta, support):
    positions = torch.arange(3 * 7, dtype=torch.float64).reshape(3, 7)
    student, teacher = 3 * torch.sin(1.3 * positions), 2 * torch.cos(0.7 * positions * positions)
    got = divergence(student, teacher, kind="gkd", beta=beta, temperature=2.0, top_k=2, support=support)
    assert got.tolist() == pytest.approx(TRL_TOP_2[beta, support], abs=1e-9)


@kinds
@pytest.mark.parametrize("places", [0, 2])
def test_a_row_without_a_score_pulls_nowhere(kind, beta, places):
    student, _ = logits()
    ids = torch.full((30, places), -1)
    got = sparse_divergence_and_grad(student, ids, torch.zeros(30, places), kind=kind, beta=beta)
    torch.testing.assert_close(got.value_C, torch.zeros(30, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(got.grad_CV, torch.zeros(30, V, dtype=torch.float64), atol=1e-12, rtol=0)
    assert not got.top1_agree_C.any()


@pytest.mark.parametrize(
    "ids, logprobs, message",
    [
        ([[0, 0]], [[-1.0, -1.0]], "repeat within a row"),
        ([[0, V]], [[-1.0, -1.0]], f"span 0..{V} but the student's vocabulary is 0..{V - 1}"),
        ([[0, -2]], [[-1.0, -1.0]], "span -2..0"),
        ([[0, 1]], [[-1.0, 3.0]], "must be at most 0 and not NaN: pass log softmax"),
        ([[0, 1]], [[-1.0, float("nan")]], "must be at most 0 and not NaN"),
    ],
)
def test_refusals_of_a_server_s_answer(ids, logprobs, message):
    with pytest.raises(ValueError, match=message):
        sparse_divergence_and_grad(torch.zeros(1, V), torch.tensor(ids), torch.tensor(logprobs), kind="gkd")
