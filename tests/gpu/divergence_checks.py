"""The fused kernel against a float64 twin, wherever it runs: see test_divergence_triton.py, which starts this file."""

import pytest
import torch

from opd.maths.divergence import ChunkDivergence, divergence_and_grad
from opd.maths.divergence_triton import fused_divergence_and_grad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LANES = 8  # tiles of 32 columns, 64 in half precision, 16 where the vocabulary is no multiple of 16
CASES = [
    ("reverse_kl", 0.5, 0.7, 80),
    ("reverse_kl", 0.5, 1.0, 37),
    ("forward_kl", 0.5, 2.0, 80),
    ("gkd", 0.25, 1.0, 37),
    ("gkd", 0.5, 0.7, 80),
    ("gkd", 0.99, 2.0, 80),
]
KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("gkd", 0.25)]


def logits(rows: int, vocabulary: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Student's and teacher's, each with a constant that the softmax must not see but float32 feels."""
    generator = torch.Generator().manual_seed(seed)
    pair = [3 * torch.randn(rows, vocabulary, generator=generator) + shift for shift in (20.0, -10.0)]
    return [x.to(dtype).to(DEVICE) for x in pair]


def twin(student: torch.Tensor, teacher: torch.Tensor, *, kind: str, beta: float, temperature: float):
    """Value, gradient by autograd and both entropies in float64; columns that either model masks are left out."""
    student, teacher = student.double().requires_grad_(), teacher.double()
    kept = (student > -1e30) & (teacher > -1e30)
    log_s = (student.masked_fill(~kept, -1e4) / temperature).log_softmax(-1)
    log_t = (teacher.masked_fill(~kept, -1e4) / temperature).log_softmax(-1)
    s, t = log_s.exp(), log_t.exp()
    if kind == "gkd":
        log_m = (beta * t + (1 - beta) * s).clamp_min(1e-300).log()
        value = (beta * t * (log_t - log_m) + (1 - beta) * s * (log_s - log_m)).sum(-1)
    else:
        value = (s * (log_s - log_t) if kind == "reverse_kl" else t * (log_t - log_s)).sum(-1)
    value.sum().backward()
    return value.detach(), student.grad, -(s * log_s).sum(-1).detach(), -(t * log_t).sum(-1)


def assert_equals_twin(got: ChunkDivergence, student: torch.Tensor, teacher: torch.Tensor, **options) -> None:
    value, grad, student_entropy, teacher_entropy = twin(student, teacher, **options)
    assert got.value_C.dtype == torch.float32
    torch.testing.assert_close(got.value_C.double(), value, atol=5e-6, rtol=2e-6)
    torch.testing.assert_close(got.student_entropy_C.double(), student_entropy, atol=5e-6, rtol=2e-6)
    torch.testing.assert_close(got.teacher_entropy_C.double(), teacher_entropy, atol=5e-6, rtol=2e-6)
    error_CV = (got.grad_CV.double() - grad).abs()
    assert error_CV.max() < 1e-5  # a KL of 16 nats is rounded to 1e-6, times 2 at temperature 0.5
    assert (error_CV.sum(-1) < 1e-5 + 2e-5 * grad.abs().sum(-1)).all()  # sees a large vocabulary's small entries too
    assert not got.tail_mass_C.any()


@pytest.mark.parametrize(("kind", "beta", "temperature", "vocabulary"), CASES)
def test_equals_the_float64_twin_over_several_tiles(kind, beta, temperature, vocabulary):
    options = {"kind": kind, "beta": beta, "temperature": temperature}
    student, teacher = logits(1, vocabulary)  # three tiles, the last one partial
    before = student.clone(), teacher.clone()
    got = fused_divergence_and_grad(student, teacher, need_grad=True, lanes=LANES, **options)
    assert_equals_twin(got, student, teacher, **options)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_without_the_gradient_the_rest_is_the_same(kind, beta):
    student, teacher = logits(1, 13)
    options = {"kind": kind, "beta": beta, "temperature": 1.0, "lanes": LANES}
    without = fused_divergence_and_grad(student, teacher, need_grad=False, **options)
    assert without.grad_CV is None
    assert torch.equal(without.value_C, fused_divergence_and_grad(student, teacher, need_grad=True, **options).value_C)


@pytest.mark.parametrize(
    ("kind", "beta", "dtype"),
    [("reverse_kl", 0.5, torch.bfloat16), ("forward_kl", 0.5, torch.float16), ("gkd", 0.25, torch.bfloat16)],
)
def test_half_precision_is_computed_in_float32(kind, beta, dtype):
    options = {"kind": kind, "beta": beta, "temperature": 1.3}
    student, teacher = logits(1, 80, dtype=dtype)
    got = fused_divergence_and_grad(student, teacher, need_grad=True, lanes=LANES, **options)
    assert got.grad_CV.dtype == got.value_C.dtype == torch.float32
    assert_equals_twin(got, student, teacher, **options)


def test_the_gradient_in_half_precision_and_a_float32_teacher():
    options = {"kind": "gkd", "beta": 0.5, "temperature": 1.0, "need_grad": True, "lanes": LANES}
    student, teacher = logits(1, 80, dtype=torch.bfloat16)
    want = fused_divergence_and_grad(student, teacher, **options).grad_CV
    narrow = fused_divergence_and_grad(student, teacher, grad_dtype=torch.bfloat16, **options).grad_CV
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), want, atol=1e-6, rtol=2**-7)  # the interpreter cuts off, CUDA rounds
    mixed = fused_divergence_and_grad(student, teacher.float(), **options).grad_CV
    torch.testing.assert_close(mixed, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_masked_columns_add_nothing(kind, beta):
    options = {"kind": kind, "beta": beta, "temperature": 0.5}  # finfo.min / 0.5 overflows
    student, teacher = logits(3, 80)
    kept = torch.ones(3, 80, dtype=torch.bool, device=DEVICE)
    lowest = torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min
    for row, columns, mask in (
        (0, slice(0, 36), -torch.inf),
        (1, slice(20, 70), lowest[0]),
        (2, slice(60, 80), lowest[1]),
    ):
        kept[row, columns] = False
        student[row, columns] = teacher[row, columns] = mask
    got = fused_divergence_and_grad(student, teacher, need_grad=True, lanes=LANES, **options)
    assert_equals_twin(got, student, teacher, **options)
    assert (got.grad_CV[~kept] == 0).all()


def test_mass_where_the_other_model_has_none_is_infinite_in_a_kl_and_finite_in_the_mixture():
    student, teacher = logits(1, 13)
    teacher[:, 4] = float("-inf")
    teacher[:, 11] = torch.finfo(torch.float32).min
    values = {}
    for kind, beta in KINDS:
        for name, (s, t) in {"teacher": (student, teacher), "student": (teacher, student)}.items():
            got = fused_divergence_and_grad(s, t, kind=kind, beta=beta, temperature=1.0, need_grad=True, lanes=LANES)
            values[kind, name] = got.value_C.item()
            want = divergence_and_grad(s.cpu(), t.cpu(), kind=kind, beta=beta)
            assert got.value_C.item() == pytest.approx(want.value_C.item(), abs=1e-5)
            if kind == "gkd":
                torch.testing.assert_close(got.grad_CV.cpu(), want.grad_CV, atol=1e-6, rtol=1e-5)
    assert values["reverse_kl", "teacher"] == values["forward_kl", "student"] == float("inf")
    assert values["reverse_kl", "student"] < 100 and values["gkd", "teacher"] < 1


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_equal_models_are_at_distance_zero(kind, beta):
    student, _ = logits(1, 48)
    got = fused_divergence_and_grad(
        student, student, kind=kind, beta=beta, temperature=1.0, need_grad=True, lanes=LANES
    )
    assert got.value_C.abs().max() < 2e-7
    assert got.grad_CV.abs().max() < 1e-7
    assert (got.top1_agree_C == 1).all()


def test_top1_agreement_counts_one_column_that_holds_both_maxima():
    student, teacher = torch.zeros(4, 48, device=DEVICE), torch.zeros(4, 48, device=DEVICE)
    student[:, 37] = 2.0
    teacher[0, 37] = 1.0  # the same
    teacher[1, 36] = 1.0  # a neighbour
    teacher[2, 3] = teacher[2, 37] = 1.0  # a tie that includes it
    teacher[3, 3] = teacher[3, 47] = 1.0  # a tie that does not
    options = {"kind": "reverse_kl", "beta": 0.5, "temperature": 1.0, "need_grad": False}
    assert fused_divergence_and_grad(student, teacher, lanes=LANES, **options).top1_agree_C.tolist() == [1, 0, 1, 0]
    assert divergence_and_grad(student.cpu(), teacher.cpu(), kind="reverse_kl").top1_agree_C.tolist() == [1, 0, 1, 0]


def test_rows_may_lie_apart_and_columns_too():
    wide_student, wide_teacher = logits(4, 64)
    options = {"kind": "reverse_kl", "beta": 0.5, "temperature": 1.0}
    for student, teacher in (
        (wide_student[::2, 16:], wide_teacher[1::2, :48]),
        (wide_student[::3, 3:16], wide_teacher[::3, :13]),
        (wide_student.T[:2, :3], wide_teacher.T[:2, 1:]),
    ):
        got = fused_divergence_and_grad(student, teacher, need_grad=True, lanes=LANES, **options)
        assert_equals_twin(got, student, teacher, **options)


def test_end_points_of_beta_no_rows_one_column_and_nan():
    student, teacher = logits(2, 7)
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        options = {"temperature": 1.0, "need_grad": True, "lanes": LANES}
        end = fused_divergence_and_grad(student, teacher, kind="gkd", beta=beta, **options)
        plain = fused_divergence_and_grad(student, teacher, kind=kind, beta=0.5, **options)
        assert torch.equal(end.value_C, plain.value_C) and torch.equal(end.grad_CV, plain.grad_CV)

    options = {"kind": "gkd", "beta": 0.5, "temperature": 1.0, "need_grad": True, "lanes": LANES}
    empty = fused_divergence_and_grad(student[:0], teacher[:0], **options)
    assert empty.value_C.shape == empty.tail_mass_C.shape == (0,) and empty.grad_CV.shape == (0, 7)
    single = fused_divergence_and_grad(student[:, :1], teacher[:, :1], **options)
    assert single.value_C.abs().max() < 1e-6 and single.grad_CV.abs().max() < 1e-6
    student[1, 5] = float("nan")
    broken = fused_divergence_and_grad(student, teacher, **options).value_C
    assert torch.isfinite(broken[0]) and torch.isnan(broken[1])
