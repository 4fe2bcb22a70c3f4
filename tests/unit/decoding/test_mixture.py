"""In-process mixture decoding: exact in distribution for every engine, and the same text whatever the batch."""

import pytest
import torch
from scipy import stats

from opd.decoding import speculative
from opd.decoding.draft_length import expected_tokens
from opd.decoding.mixture import MixtureStats, write_mixture
from opd.types import GenerationRequest, Mixture, SampleStatus, SamplingParams
from tests.unit.decoding.enumerated_mixture import (
    ANSWERS,
    LENGTH,
    STUDENT_PROMPT,
    TEACHER_PROMPT,
    TEMPERATURE,
    VOCABULARY,
    chi_square,
    exact_answers,
    make_model,
    mixed,
    pair,
    step_log_probs,
)

SEEDS = range(12)
COUNT = 800  # answers per seed
ENGINES = {
    "lockstep": {"engine": "lockstep"},
    "speculative k=2": {"draft_tokens": 2},
    "speculative k=3": {"draft_tokens": 3},
    "speculative k=6": {"draft_tokens": 6},
    "speculative adaptive": {},
}


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": TEMPERATURE, "max_new_tokens": LENGTH} | changes)


def write(student, teacher, *, count=COUNT, mixture=None, rows=COUNT, prompts=None, sampling=None, **options):
    student_prompt, teacher_prompt = prompts or (STUDENT_PROMPT, TEACHER_PROMPT)
    requests = [
        GenerationRequest(key=i, prompt_ids=student_prompt, teacher_prompt_ids=teacher_prompt) for i in range(count)
    ]
    return list(
        write_mixture(
            student,
            teacher,
            requests,
            sampling or params(),
            mixture or Mixture(),
            max_running_requests=rows,
            max_context_len=60,
            **options,
        )
    )


def p_values(**options) -> list[float]:
    return [
        chi_square(write(*pair(seed), sampling=params(seed=seed), **options), exact_answers(*pair(seed)))
        for seed in SEEDS
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_frequencies_are_those_of_the_enumerated_mixture(engine):
    found = p_values(**ENGINES[engine])
    assert stats.combine_pvalues(found).pvalue > 1e-3
    assert stats.kstest(found, "uniform").pvalue > 1e-3  # not concentrated anywhere
    assert min(found) > 1e-4


def test_two_views_of_one_model_are_exact_too():
    model = make_model(40)
    found = [chi_square(write(model, model, sampling=params(seed=seed)), exact_answers(model, model)) for seed in SEEDS]
    assert stats.combine_pvalues(found).pvalue > 1e-3


def test_ess_weights_is_exact_too():
    found = [
        chi_square(
            write(*pair(seed), sampling=params(seed=seed), mixture=Mixture(method="ess_weights")),
            exact_answers(*pair(seed), "ess_weights"),
        )
        for seed in SEEDS
    ]
    assert stats.combine_pvalues(found).pvalue > 1e-3


def test_drawing_from_q_after_a_rejection_would_show(monkeypatch):
    monkeypatch.setattr(speculative, "replacement_weights", lambda draft, target: target.exp())
    assert stats.combine_pvalues(p_values(draft_tokens=3)).pvalue < 1e-12


def test_accepting_with_the_teachers_ratio_would_show(monkeypatch):
    def teachers_log_probs(mixed, student_BV, teacher_BV, ids_B):
        return teacher_BV.log_softmax(-1).gather(1, ids_B[:, None])[:, 0]

    monkeypatch.setattr(speculative, "mixed_logprobs_at", teachers_log_probs)
    assert stats.combine_pvalues(p_values(draft_tokens=3)).pvalue < 1e-12


def prompts_of(i: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    student = tuple((3 * i + j) % VOCABULARY for j in range(1 + i % 5))
    return student, tuple((i + 2 * j) % VOCABULARY for j in range(2 + (5 * i) % 7))


def ragged(engine_options, rows, **changes):
    requests = [
        GenerationRequest(key=i, prompt_ids=prompts_of(i // 2)[0], teacher_prompt_ids=prompts_of(i // 2)[1])
        for i in range(24)
    ]
    settings = params(**{"max_new_tokens": 14, "stop_token_ids": (1,), "temperature": 1.0} | changes)
    found = write_mixture(
        *pair(3), requests, settings, Mixture(), max_running_requests=rows, max_context_len=60, **engine_options
    )
    return {r.key: r for r in found}, {r.key: r for r in requests}


def test_the_text_depends_neither_on_the_draft_length_nor_on_the_batch():
    want, _ = ragged({"draft_tokens": 1}, rows=24)
    assert len({tuple(r.response_ids) for r in want.values()}) > 12
    for options in ENGINES.values():
        if options.get("engine") != "lockstep":
            for rows in (3, 24):
                got, _ = ragged(options, rows=rows)
                assert {k: r.response_ids for k, r in got.items()} == {k: r.response_ids for k, r in want.items()}


@pytest.mark.parametrize("options", [ENGINES["lockstep"], ENGINES["speculative k=3"]], ids=["lockstep", "speculative"])
@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_log_probs_and_alphas_are_those_of_full_forward_passes(options, limits):
    results, requests = ragged(options, rows=5, **limits)
    for key, result in results.items():
        request, n = requests[key], len(result.response_ids)
        rows = []
        for model, prompt in zip(pair(3), (request.prompt_ids, request.teacher_prompt_ids), strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *result.response_ids]])).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.double().log_softmax(-1))
        ids = torch.tensor(result.response_ids)[:, None]
        for want, got in zip(rows, (result.student_log_probs, result.teacher_log_probs), strict=True):
            torch.testing.assert_close(torch.tensor(got), want.gather(1, ids)[:, 0].float(), atol=2e-5, rtol=0)
        for i in range(n):
            kept_s, kept_t = (kept(row[i], **limits) for row in rows)
            both = kept_s.isfinite() & kept_t.isfinite()
            if int(both.sum()) > 1:
                log_s, log_t = kept_s[both].log_softmax(-1), kept_t[both].log_softmax(-1)
                log_q, alpha = mixed(log_s, log_t, "kl_symmetry")
                if float((log_s.exp() * (log_s - log_t)).sum()) > 1e-3:  # nearer than that, any weight gives one q
                    assert result.alphas[i] == pytest.approx(float(alpha), abs=1e-3)
                place = int(both[: result.response_ids[i]].sum())
                assert result.log_probs[i] == pytest.approx(float(log_q[place]), abs=1e-4)
            if both.any():
                assert both[result.response_ids[i]]


def kept(log_probs: torch.Tensor, top_k: int = -1, top_p: float = 1.0) -> torch.Tensor:
    order = log_probs.argsort(descending=True)
    before = log_probs.exp()[order].cumsum(0) - log_probs.exp()[order]
    count = top_k if top_k > 0 else int((before < top_p).sum())
    return torch.full_like(log_probs, -torch.inf).scatter(0, order[:count], log_probs[order[:count]])


def test_statuses_and_lengths():
    results, _ = ragged(ENGINES["speculative k=6"], rows=5)
    for result in results.values():
        ended = result.response_ids[-1] == 1
        assert result.status is (SampleStatus.COMPLETED if ended else SampleStatus.TRUNCATED)
        assert 1 not in result.response_ids[:-1] and len(result.response_ids) <= 14
        assert ended or len(result.response_ids) == 14
        lengths = {len(result.log_probs), len(result.student_log_probs), len(result.teacher_log_probs)}
        assert lengths == {len(result.response_ids)} == {len(result.alphas)}


def test_at_scale_zero_the_student_writes_what_it_writes_alone():
    student, teacher = pair(5)
    settings = {"count": 30, "rows": 30, "sampling": params(max_new_tokens=10)}
    mixed_ = {r.key: r.response_ids for r in write(student, teacher, mixture=Mixture(scale=0.0), **settings)}
    alone = {r.key: r.response_ids for r in write(student, teacher, engine="student", **settings)}
    assert mixed_ == alone


def test_acceptance_and_tokens_per_round_follow_the_formula():
    totals = MixtureStats()
    for seed in SEEDS:
        write(*pair(seed), count=64, rows=64, sampling=params(max_new_tokens=20), draft_tokens=4, stats=totals)
    judged = 1 - float(torch.stack([overlap(seed) for seed in SEEDS]).mean())
    assert totals.acceptance == pytest.approx(judged, abs=0.12)  # of other prefixes than those sampled
    assert totals.tokens_per_round == pytest.approx(expected_tokens(totals.acceptance, 4), rel=0.15)
    assert totals.tokens == 12 * 64 * 20


def overlap(seed: int) -> torch.Tensor:
    """Total variation of student and mixture, the mean over positions."""
    log_s, log_t = step_log_probs(pair(seed)[0], STUDENT_PROMPT), step_log_probs(pair(seed)[1], TEACHER_PROMPT)
    log_q, _ = mixed(log_s, log_t, "kl_symmetry")
    weights = exact_answers(*pair(seed))[:, None]
    return ((log_s.exp() - log_q.exp()).abs().sum(-1) / 2 * weights).sum(0).mean()


def test_a_bad_row_does_not_stop_the_others():
    student, teacher = make_model(50), make_model(51, 24)
    requests = [
        GenerationRequest(key=0, prompt_ids=(2, 3)),
        GenerationRequest(key=1, prompt_ids=()),
        GenerationRequest(key=2, prompt_ids=(2,) * 60),
        GenerationRequest(key=3, prompt_ids=(2, 3), teacher_prompt_ids=(2,) * 60),
        GenerationRequest(key=4, prompt_ids=(4, 4)),
    ]
    found = write_mixture(student, teacher, requests, params(), Mixture(), max_running_requests=2, max_context_len=60)
    results = {r.key: r for r in found}
    assert {key: r.error for key, r in results.items() if r.error} == {
        1: "a prompt has no tokens: there is nothing to start from",
        2: "a prompt of 60 tokens leaves no room for an answer within 60 tokens",
        3: "a prompt of 60 tokens leaves no room for an answer within 60 tokens",
    }
    assert all(results[key].status is SampleStatus.ABORTED for key in (1, 2, 3))
    assert all(len(results[key].response_ids) == LENGTH for key in (0, 4))


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_logits_that_are_no_numbers_end_their_row_only(options, broken):
    models = dict(zip(("student", "teacher"), pair(7), strict=True))
    poison = 3  # in a prompt; nobody writes it
    handles = [
        models[broken].model.embed_tokens.register_forward_hook(
            lambda module, inputs, output: torch.where((inputs[0] == poison)[..., None], torch.nan, output)
        )
    ]
    for model in models.values():
        ban = torch.zeros(VOCABULARY).index_fill(0, torch.tensor([poison]), -torch.inf)
        handles.append(model.lm_head.register_forward_hook(lambda module, inputs, output, ban=ban: output + ban))
    requests = [
        GenerationRequest(key=i, prompt_ids=(2, 0, 1), teacher_prompt_ids=(4, poison if i % 4 == 1 else 2, 0))
        if broken == "teacher"
        else GenerationRequest(key=i, prompt_ids=(4, poison if i % 4 == 1 else 2, 0))
        for i in range(12)
    ]
    try:
        found = write_mixture(
            *models.values(), requests, params(), Mixture(), max_running_requests=2, max_context_len=60, **options
        )
        results = {r.key: r for r in found}
    finally:
        for handle in handles:
            handle.remove()
    problem = f"the {broken}'s logits of its next token are NaN or infinite"
    assert {key: r.error for key, r in results.items() if r.error} == {key: problem for key in (1, 5, 9)}
    assert all(r.response_ids == r.log_probs == [] for r in results.values() if r.error)
    assert all(len(r.response_ids) == LENGTH for r in results.values() if not r.error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, "engine='fast' is none of speculative"),
        ({"draft_tokens": 0}, "draft_tokens=0 must be at least 1"),
        ({"sampling": params(temperature=0.0)}, "temperature=0.0 must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        write(*pair(0), count=1, **options)


def test_the_enumeration_itself():
    probabilities = exact_answers(*pair(1))
    assert float(probabilities.sum()) == pytest.approx(1)
    assert len(probabilities) == len(ANSWERS) == VOCABULARY**LENGTH
