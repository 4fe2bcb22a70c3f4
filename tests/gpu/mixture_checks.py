"""The mixture kernel against the torch solver in float64, wherever it runs: started by test_mixture_triton.py."""

import pytest
import torch

from opd.maths.mixture import mix
from opd.maths.mixture_triton import solve_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = ("kl_symmetry", "ess_weights")
LANES = 16  # three tiles for 37 columns


def logits(rows, vocabulary=37, *, spread=3.0, apart=2.0, seed=0, dtype=torch.float32):
    """Student's and teacher's, each with a constant that the mixture must not see."""
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(rows, vocabulary, generator=generator)
    teacher = student + apart * torch.randn(rows, vocabulary, generator=generator)
    return [x.to(dtype).to(DEVICE) for x in (student + 12, teacher - 7)]


def assert_equals_twin(student, teacher, *, method, scale=1.0, lanes=LANES):
    """The twin is itself held against bisection in tests/unit/maths/test_mixture.py."""
    got = solve_rows(student, teacher, method=method, scale=scale, lanes=lanes)
    want = mix(student.double(), teacher.double(), method=method, scale=scale)
    assert torch.equal(got.overlap, want.overlap_B)
    torch.testing.assert_close(got.alpha.double(), want.alpha_B, atol=3e-6, rtol=0, equal_nan=True)
    torch.testing.assert_close(got.student_norm.double(), want.student_norm_B, atol=3e-6, rtol=0, equal_nan=True)
    torch.testing.assert_close(got.teacher_norm.double(), want.teacher_norm_B, atol=3e-6, rtol=0, equal_nan=True)
    # of the weight that was found, not of the twin's
    weight = got.alpha.double()[:, None]
    log_q = (1 - weight) * student.double() + weight * teacher.double() - got.log_norm.double()[:, None]
    total = log_q[got.overlap].nan_to_num(nan=-torch.inf).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=3e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind", [{}, {"vocabulary": 5}, {"spread": 8.0, "apart": 6.0}, {"spread": 0.3, "apart": 0.3}], ids=str
)
def test_equals_the_float64_twin(kind, method):
    assert_equals_twin(*logits(3, **kind), method=method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_a_scaled_weight(dtype):
    student, teacher = logits(2, dtype=dtype)
    assert_equals_twin(student, teacher, method="kl_symmetry", scale=0.4)
    assert_equals_twin(student, teacher.float(), method="kl_symmetry", scale=9.0)


@pytest.mark.parametrize("method", METHODS)
def test_truncated_disjoint_and_broken_rows(method):
    student, teacher = logits(7)
    student[0, :20] = -torch.inf
    teacher[0, 10:30] = torch.finfo(torch.float32).min
    student[1, :20] = teacher[1, 20:] = -torch.inf
    teacher[2] = -torch.inf
    student[3] = -torch.inf
    student[4, 7], student[4, 8] = torch.nan, -torch.inf
    teacher[5, 7], student[5, 7] = torch.inf, -torch.inf
    assert_equals_twin(student, teacher, method=method)
    got = solve_rows(student, teacher, method=method, scale=1.0, lanes=LANES)
    assert got.alpha.isnan().tolist() == [False, False, False, True, True, True, False]
    assert got.alpha[1:3].tolist() == [0.0, 0.0]
    assert torch.equal(got.log_norm[1:3], got.student_norm[1:3])
    assert got.log_norm.isnan().tolist() == got.alpha.isnan().tolist()


@pytest.mark.parametrize("method", METHODS)
def test_one_common_token_and_equal_models_share_the_weight(method):
    student, teacher = logits(2)
    student[0, 1:] = -torch.inf
    teacher[1] = student[1]
    assert solve_rows(student, teacher, method=method, scale=1.0, lanes=LANES).alpha.tolist() == [0.5, 0.5]


def test_rows_apart_columns_apart_and_no_rows():
    student, teacher = logits(4, 64)
    assert_equals_twin(student[::2, 3:40], teacher[1::2, :37], method="kl_symmetry")
    assert_equals_twin(student.T[:2, :3], teacher.T[:2, 1:], method="kl_symmetry")
    assert solve_rows(student[:0], teacher[:0], method="kl_symmetry", scale=1.0).alpha.shape == (0,)
