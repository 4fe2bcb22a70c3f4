"""The mixture's weight against bisection in float64, and the distribution that it gives."""

import pytest
import torch

from opd.maths import mixture
from opd.maths.mixture import METHODS, mix, mixed_logprobs, mixed_logprobs_at, mixture_logprobs, solve_alpha

SOLVED = ("kl_symmetry", "ess_weights", "entropy")
INF = float("inf")


def pair(rows=6, vocabulary=50, *, spread=3.0, apart=2.0, seed=0, dtype=torch.float32):
    """Logits with a constant each that q must not see."""
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    teacher = student + apart * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    return (student + 12).to(dtype), (teacher - 7).to(dtype)


def on_common_support(student, teacher):
    """(log s, log t, L) in float64, renormalised; -inf, -inf and 0 elsewhere."""
    student, teacher = student.double(), teacher.double()
    outside = (student == -INF) | (teacher == -INF)
    log_s, log_t = (x.masked_fill(outside, -INF).log_softmax(-1) for x in (student, teacher))
    return log_s, log_t, (log_t - log_s).masked_fill(outside, 0.0)


def twin(student, teacher, method):
    """[B] by halving an interval 30 times."""
    log_s, log_t, ratio = on_common_support(student, teacher)
    s, t = log_s.exp(), log_t.exp()
    if method == "entropy":
        own, other = (-(p * log_p.masked_fill(p == 0, 0)).sum(-1) for p, log_p in ((s, log_s), (t, log_t)))
        return own / (own + other)

    def too_high(alpha):
        if method == "kl_symmetry":
            return ((log_s + alpha * ratio).softmax(-1) * ratio).sum(-1, keepdim=True) > 0
        powers = [(log_s + exponent * ratio).logsumexp(-1, keepdim=True) for exponent in (-alpha, 2 - alpha)]
        return powers[0] > powers[1]

    low = torch.zeros(len(student), 1, dtype=torch.float64)
    high = low + 1
    for _ in range(30):
        middle = (low + high) / 2
        high, low = torch.where(too_high(middle), middle, high), torch.where(too_high(middle), low, middle)
    return low[:, 0]


def assert_solves(student, teacher, method, tolerance=1e-5):
    torch.testing.assert_close(
        solve_alpha(student, teacher, method=method).double(), twin(student, teacher, method), atol=tolerance, rtol=0
    )


PAIRS = {
    "near": {"apart": 0.3},
    "usual": {},
    "flat": {"spread": 0.5, "apart": 1.0},
    "peaked": {"spread": 6.0},
    "far": {"spread": 0.5, "apart": 10.0},
    "very far": {"spread": 15.0, "apart": 20.0},
    "two tokens": {"vocabulary": 2, "apart": 6.0, "spread": 0.5},
}


@pytest.mark.parametrize("method", SOLVED)
@pytest.mark.parametrize("kind", PAIRS)
def test_alpha_is_that_of_bisection_in_float64(kind, method):
    student, teacher = pair(64, **({"vocabulary": 500} | PAIRS[kind]))
    assert_solves(student, teacher, method)


@pytest.mark.parametrize("method", SOLVED)
def test_full_vocabulary(method):
    generator = torch.Generator().manual_seed(5)
    student = 2 * torch.randn(3, 151_936, generator=generator)
    teacher = student + torch.randn(3, 151_936, generator=generator)
    for logits, rows in ((student, slice(0, 1)), (teacher, slice(0, 2))):  # both peaked; the teacher alone; both flat
        logits[rows, 100:116] += 14 * torch.rand(len(logits[rows]), 16, generator=generator)
    assert_solves(student, teacher, method)


def test_the_chernoff_point():
    student, teacher = pair(dtype=torch.float64)
    mixed = mix(student, teacher, method="kl_symmetry")
    assert mixed.alpha_B.dtype == torch.float64
    log_q = mixed_logprobs(mixed, student, teacher)
    log_s, log_t, _ = on_common_support(student, teacher)
    to_student, to_teacher = ((log_q.exp() * (log_q - log_p)).sum(-1) for log_p in (log_s, log_t))
    torch.testing.assert_close(to_student, to_teacher, atol=1e-12, rtol=0)
    scaled = mixed.student_norm_B + mixed.alpha_B * (mixed.teacher_norm_B - mixed.student_norm_B)
    torch.testing.assert_close(to_student, scaled - mixed.log_norm_B, atol=1e-12, rtol=0)  # -log sum s^(1-a) t^a
    for alpha in (0.1, 0.9):
        log_r = mixture_logprobs(student, teacher, torch.full((6,), alpha, dtype=torch.float64))
        worse = torch.stack([(log_r.exp() * (log_r - log_p)).sum(-1) for log_p in (log_s, log_t)]).max(0).values
        assert (worse > to_student).all()


def test_samples_of_q_stand_for_as_many_of_either_model():
    student, teacher = pair(dtype=torch.float64)
    log_s, log_t, _ = on_common_support(student, teacher)

    def needed(alpha_B):
        log_q = mixture_logprobs(student, teacher, alpha_B)
        return [(2 * log_p - log_q).exp().sum(-1) for log_p in (log_s, log_t)]

    for_student, for_teacher = needed(solve_alpha(student, teacher, method="ess_weights"))
    torch.testing.assert_close(for_student, for_teacher, atol=0, rtol=1e-10)
    assert for_student.max() > 1.1
    unequal = needed(torch.full((6,), 0.5, dtype=torch.float64))
    assert not torch.allclose(*unequal, rtol=1e-2)


def test_samples_of_either_model_stand_for_as_many_of_the_geometric_mean():
    student, teacher = pair(dtype=torch.float64)
    log_s, log_t, _ = on_common_support(student, teacher)
    alpha_B = solve_alpha(student, teacher, method="ess_balance")
    log_q = mixture_logprobs(student, teacher, alpha_B)
    of_student, of_teacher = ((2 * log_q - log_p).exp().sum(-1) for log_p in (log_s, log_t))
    torch.testing.assert_close(of_student, of_teacher, atol=0, rtol=1e-10)
    torch.testing.assert_close(of_student.log(), -2 * ((log_s + log_t) / 2).logsumexp(-1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", SOLVED)
def test_swapping_the_models_swaps_the_weights(method):
    student, teacher = pair(32)
    forth, back = solve_alpha(student, teacher, method=method), solve_alpha(teacher, student, method=method)
    torch.testing.assert_close(forth + back, torch.ones(32), atol=2e-6, rtol=0)
    assert (forth - 0.5).abs().max() > 0.02


@pytest.mark.parametrize("method", SOLVED)
def test_truncated_supports(method):
    student, teacher = pair(40, 30)
    for logits in (student, teacher):
        logits.masked_fill_(logits < logits.topk(8).values[:, -1:], -INF)
    common = (student > -INF) & (teacher > -INF)
    assert common.sum(-1).min() >= 2 and common.sum(-1).float().mean() < 6
    assert_solves(student, teacher, method)
    mixed = mix(student, teacher, method=method)
    log_q = mixed_logprobs(mixed, student, teacher)
    assert torch.equal(log_q > -INF, common)
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(40), atol=3e-6, rtol=0)
    torch.testing.assert_close(mixed.student_norm_B, student.logsumexp(-1))  # of its own support
    torch.testing.assert_close(mixed.teacher_norm_B, teacher.logsumexp(-1))
    lowest = torch.finfo(torch.float32).min
    filled = mix(student.clamp_min(lowest), teacher.clamp_min(lowest), method=method)
    assert torch.equal(filled.alpha_B, mixed.alpha_B) and torch.equal(filled.log_norm_B, mixed.log_norm_B)


def test_common_support_far_below_both_maxima():
    student = torch.tensor([[300.0, -INF, 1.0, 2.0, 3.0]])
    teacher = torch.tensor([[-INF, 400.0, 3.0, 1.0, 2.5]])
    for method in SOLVED:
        assert_solves(student, teacher, method)
    log_q = mixed_logprobs(mix(student, teacher, method="kl_symmetry"), student, teacher)
    torch.testing.assert_close(log_q[:, 2:].exp().sum(-1), torch.ones(1))


@pytest.mark.parametrize("method", METHODS)
def test_without_overlap_q_is_the_student(method):
    student, teacher = pair(3, 8)
    student[0, 4:] = teacher[0, :4] = -INF
    teacher[1] = -INF
    mixed = mix(student, teacher, method=method, fixed_alpha=0.3 if method == "fixed" else None)
    assert mixed.overlap_B.tolist() == [False, False, True]
    assert mixed.alpha_B[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(mixed_logprobs(mixed, student, teacher)[:2], student[:2].log_softmax(-1))
    ids = torch.tensor([1, 6, 2])
    torch.testing.assert_close(
        mixed_logprobs_at(mixed, student, teacher, ids)[:2],
        student.log_softmax(-1).gather(1, ids[:, None])[:2, 0],
    )


@pytest.mark.parametrize("method", SOLVED)
def test_where_the_models_agree_on_the_support_half_of_each(method):
    student, _ = pair(4, 9)
    teacher = student + 3.0  # rounds each logit a little differently
    teacher[1:3] = student[1:3].flip(-1) - 40.0
    student[1, :8], student[2, 1:] = -INF, -INF  # one token
    teacher[3, 2:5] = -INF
    alpha = solve_alpha(student, teacher, method=method)
    assert alpha[1:3].tolist() == [0.5, 0.5]
    if method == "entropy":
        torch.testing.assert_close(alpha, torch.full((4,), 0.5), atol=1e-6, rtol=0)
    else:
        assert alpha.tolist() == [0.5] * 4


def test_two_models_that_are_all_but_certain():
    """Their probabilities of the top token round to 1, and the weight still comes from the others."""
    student = torch.tensor([[20.0, 0.0, -1.0, -4.0]])
    teacher = torch.tensor([[23.0, 1.0, 5.0, -4.0]])
    for method in SOLVED:
        assert abs(twin(student, teacher, method).item() - 0.5) > 0.01
        assert_solves(student, teacher, method, tolerance=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("broken", [float("nan"), INF], ids=str)
def test_a_broken_row_is_nan_and_leaves_the_others_alone(method, broken):
    options = {"method": method, "fixed_alpha": 0.3 if method == "fixed" else None}
    student, teacher = pair(4, 20)
    whole = mix(student, teacher, **options)
    student[1, 3] = broken
    teacher[2, 5] = broken
    student[2, 5] = -INF  # not even on the common support
    mixed = mix(student, teacher, **options)
    assert mixed.alpha_B.isnan().tolist() == [False, True, True, False]
    assert mixed_logprobs(mixed, student, teacher)[1:3].isnan().all()
    for name in ("alpha_B", "student_norm_B", "teacher_norm_B", "log_norm_B"):
        assert torch.equal(getattr(mixed, name)[::3], getattr(whole, name)[::3]), name
    student[0] = -INF
    assert mix(student, teacher, **options).alpha_B[:1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = pair(8, 300, dtype=dtype)
    for method in SOLVED:
        assert solve_alpha(student, teacher, method=method).dtype == torch.float32
        assert_solves(student, teacher, method)
        assert_solves(student, teacher.float(), method)
    log_q = mixture_logprobs(student, teacher, torch.full((8,), 0.4))
    assert log_q.dtype == torch.float32
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(8), atol=3e-6, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("method", METHODS)
def test_the_normaliser_belongs_to_the_weight_in_use(method, scale):
    options = {"method": method, "fixed_alpha": 0.35 if method == "fixed" else None}
    student, teacher = pair(5, 2000)
    mixed = mix(student, teacher, **options, scale=scale)
    plain = mix(student, teacher, **options)
    torch.testing.assert_close(mixed.alpha_B, (scale * plain.alpha_B).clamp_max(1))
    log_q = mixed_logprobs(mixed, student, teacher)
    torch.testing.assert_close(log_q.double().exp().sum(-1), torch.ones(5, dtype=torch.float64), atol=2e-6, rtol=0)
    by_hand = torch.lerp(student, teacher, mixed.alpha_B[:, None]) - mixed.log_norm_B[:, None]
    torch.testing.assert_close(log_q, by_hand, atol=5e-6, rtol=0)
    torch.testing.assert_close(log_q, mixture_logprobs(student, teacher, mixed.alpha_B), atol=4e-6, rtol=0)
    ids = torch.tensor([0, 3, 1999, 700, 1])
    torch.testing.assert_close(
        mixed_logprobs_at(mixed, student, teacher, ids), log_q.gather(1, ids[:, None])[:, 0], atol=2e-6, rtol=0
    )
    if scale == 0:
        torch.testing.assert_close(log_q, student.log_softmax(-1), atol=5e-6, rtol=0)
    if scale == 5.0 and method != "entropy":
        torch.testing.assert_close(log_q, teacher.log_softmax(-1), atol=5e-6, rtol=0)


def test_any_leading_shape_and_no_rows():
    student, teacher = pair(6, 40)
    flat = mix(student, teacher, method="kl_symmetry")
    folded = [x.view(2, 3, 40).transpose(0, 1) for x in (student, teacher)]
    mixed = mix(*folded, method="kl_symmetry")
    assert torch.equal(mixed.alpha_B, flat.alpha_B.view(2, 3).T)
    ids = torch.arange(6).view(3, 2)
    want = mixed_logprobs(mixed, *folded)
    assert want.shape == (3, 2, 40)
    torch.testing.assert_close(mixed_logprobs_at(mixed, *folded, ids), want.gather(-1, ids[..., None])[..., 0])
    assert solve_alpha(student[0], teacher[0], method="kl_symmetry").shape == ()
    none = mix(student[:0], teacher[:0], method="entropy")
    assert none.alpha_B.shape == (0,) and mixed_logprobs(none, student[:0], teacher[:0]).shape == (0, 40)


def test_blocks_of_rows_give_what_all_rows_at_once_give(monkeypatch):
    student, teacher = pair(7, 64)
    whole = mix(student, teacher, method="kl_symmetry")
    monkeypatch.setattr(mixture, "_ELEMENTS_A_THREAD", 2 * 64 // torch.get_num_threads())
    assert len(mixture._blocks(student)) == 4
    parts = mix(student, teacher, method="kl_symmetry")
    assert torch.equal(whole.alpha_B, parts.alpha_B) and torch.equal(whole.log_norm_B, parts.log_norm_B)
    assert torch.equal(mixed_logprobs(parts, student, teacher), mixed_logprobs(whole, student, teacher))


def test_nothing_waits_for_the_device_or_branches_on_a_value():
    """On the meta device there are no values: reading one raises."""
    student, teacher = (torch.empty(3, 16, device="meta") for _ in range(2))
    with pytest.raises(RuntimeError):
        bool(student.sum() > 0)
    for method in METHODS:
        mixed = mix(student, teacher, method=method, fixed_alpha=0.5 if method == "fixed" else None)
        assert mixed.alpha_B.shape == (3,) and mixed_logprobs(mixed, student, teacher).shape == (3, 16)
    ids = torch.zeros(3, dtype=torch.long, device="meta")
    assert mixed_logprobs_at(mixed, student, teacher, ids).shape == (3,)


def test_the_solver_is_one_graph_for_the_compiler():
    """With the backend that runs the graph as it is: the one that generates code takes half a minute."""
    student, teacher = pair(3, 40)
    solve = torch.compile(mixture._solve_in_fresh_buffers, fullgraph=True, dynamic=True, backend="eager")
    want = mix(student, teacher, method="kl_symmetry", scale=0.5)
    with torch.no_grad():
        got = solve(student, teacher, method="kl_symmetry", alpha=None, scale=torch.tensor(0.5))
    torch.testing.assert_close(got.alpha, want.alpha_B, atol=5e-7, rtol=0)  # sums are in float64 for the compiler
    torch.testing.assert_close(got.log_norm, want.log_norm_B, atol=2e-6, rtol=0)


def test_refusals():
    student, teacher = pair(2, 8)
    ok = {"method": "kl_symmetry"}
    for match, logits, options in (
        (r"method='kl' is not a way to mix: choose one of kl_symmetry", (student, teacher), {"method": "kl"}),
        ("method='fixed' needs fixed_alpha", (student, teacher), {"method": "fixed"}),
        ("fixed_alpha=0.5 has no effect with method='entropy'", None, {"method": "entropy", "fixed_alpha": 0.5}),
        (r"fixed_alpha=1.5 must be in \[0, 1\]", None, {"method": "fixed", "fixed_alpha": 1.5}),
        ("fixed_alpha=nan must be", None, {"method": "fixed", "fixed_alpha": float("nan")}),
        ("scale=-1 must be a finite number", None, ok | {"scale": -1}),
        ("scale=inf must be", None, ok | {"scale": INF}),
        ("scale=nan must be", None, ok | {"scale": float("nan")}),
        (r"student logits \(2, 8\) and teacher logits \(2, 7\)", (student, teacher[:, :7]), ok),
        (r"\(2, 0\) and teacher logits \(2, 0\)", (student[:, :0], teacher[:, :0]), ok),
        ("teacher logits of torch.int64 must be", (student, teacher.long()), ok),
        ("student logits on cpu and teacher logits on meta", (student, teacher.to("meta")), ok),
    ):
        with pytest.raises(ValueError, match=match):
            mix(*(logits or (student, teacher)), **options)
    with pytest.raises(ValueError, match=r"alpha has shape \(3,\) and the logits \(2, 8\)"):
        mixture_logprobs(student, teacher, torch.zeros(3))
