"""OptimalSampler on tiny random models: which model reads what, what comes back, and what a bad row does."""

from __future__ import annotations

import logging

import pytest
import torch

import opd
from opd.data.tokenizer import load_tokenizer
from opd.errors import UserError
from opd.sampling import backends
from opd.types import GenerationResult, SampleStatus
from tests.unit.data.tiny_tokenizer import IDS
from tests.unit.sampling.tiny_pair import write_pair

pytestmark = pytest.mark.unit

TEACHER_PROMPTS = ["three is one plus two", "two is one plus one", "one is one plus one"]
STUDENT_PROMPTS = ["one plus two", "one plus one", "is"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def sampler(folders):
    return opd.OptimalSampler(
        model_teacher=folders[1],
        model_theta=folders[0],
        alpha_method="fixed",
        fixed_alpha=0.3,
        track_alpha_stats=True,
        max_running_requests=2,
    )


@pytest.fixture
def scripted(monkeypatch):
    """Engine results in place of decoding: list of (key, words, error); returns the list to fill."""
    script: list[tuple[int, str, str | None]] = []

    def write(student, teacher, requests, params, mixture, *, stats, **_):
        asked = {request.key for request in requests}
        for key, words, error in script:
            assert key in asked
            ids = [IDS[word] for word in words.split()]
            numbers = [float(i) for i in range(len(ids))]
            stats.tokens, stats.row_rounds = stats.tokens + len(ids), stats.row_rounds + 1
            yield GenerationResult(
                key=key,
                response_ids=ids,
                log_probs=[-n for n in numbers],
                student_log_probs=[-2 * n for n in numbers],
                teacher_log_probs=[-3 * n for n in numbers],
                alphas=[n / 10 for n in numbers],
                status=SampleStatus.ABORTED
                if error
                else SampleStatus.COMPLETED
                if words.endswith("</s>")
                else SampleStatus.TRUNCATED,
                error=error,
            )

    monkeypatch.setattr(backends, "write_mixture", write)
    return script


def logprobs_of(folder, prompt_ids, response_ids):
    """[L, V] by one whole forward pass, over the 10 ids of the tokenizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt_ids, *response_ids]])).logits[0]
    return logits[len(prompt_ids) - 1 : -1, : len(IDS)].log_softmax(-1)


def test_each_model_reads_its_own_prompt_and_q_is_their_mixture(sampler, folders):
    output = sampler.generate(TEACHER_PROMPTS, STUDENT_PROMPTS, max_tokens=6, seed=3)
    assert [s.teacher_prompt for s in output.samples] == TEACHER_PROMPTS
    assert [s.student_prompt for s in output.samples] == STUDENT_PROMPTS
    for sample in output.samples:
        ids = torch.tensor(sample.response_ids)[:, None]
        student = logprobs_of(folders[0], sample.student_prompt_ids, sample.response_ids)
        teacher = logprobs_of(folders[1], sample.teacher_prompt_ids, sample.response_ids)
        mixture = (0.7 * student + 0.3 * teacher).log_softmax(-1)
        for got, want in (
            (sample.student_log_probs, student),
            (sample.teacher_log_probs, teacher),
            (sample.mixture_log_probs, mixture),
        ):
            torch.testing.assert_close(torch.tensor(got), want.gather(1, ids)[:, 0], atol=1e-4, rtol=1e-4)
        assert sample.text == sampler.tokenizer.decode(sample.response_ids, skip_special_tokens=True)
    assert output.alpha_stats.mean == pytest.approx(0.3) and output.alpha_stats.std == pytest.approx(0, abs=1e-6)
    assert output.stats.tokens == output.alpha_stats.tokens == sum(len(s.response_ids) for s in output.samples)
    assert 0 < output.stats.acceptance <= 1 and output.stats.tokens_per_round >= 1


def test_without_theta_prompts_both_read_the_same(sampler):
    (sample,) = sampler.generate(["one plus"], max_tokens=1).samples
    assert sample.student_prompt_ids == sample.teacher_prompt_ids == [IDS["one"], IDS["plus"]]


def test_a_key_names_the_draws_of_an_answer(sampler):
    many = sampler.generate(TEACHER_PROMPTS, STUDENT_PROMPTS, max_tokens=12, keys=[5, 6, 7])
    alone = sampler.generate(TEACHER_PROMPTS[2:], STUDENT_PROMPTS[2:], max_tokens=12, keys=[7])
    assert alone.samples[0].response_ids == many.samples[2].response_ids
    others = [sampler.generate(TEACHER_PROMPTS[2:], STUDENT_PROMPTS[2:], max_tokens=12, keys=[k]) for k in (8, 9)]
    assert any(other.samples[0].response_ids != alone.samples[0].response_ids for other in others)


def test_a_prefix_is_read_by_both_models_and_not_part_of_the_sample(sampler):
    options = dict(max_tokens=6, seed=1)
    (sample,) = sampler.generate(["one"], ["two"], prefixes=[[IDS["is"], IDS["plus"]]], **options).samples
    (same,) = sampler.generate(["one is plus"], ["two is plus"], **options).samples
    assert sample.response_ids == same.response_ids
    assert sample.mixture_log_probs == pytest.approx(same.mixture_log_probs, abs=1e-5)
    assert (sample.teacher_prompt, sample.student_prompt_ids) == ("one", [IDS["two"]])


def test_one_model_under_both_names_is_loaded_once(folders, monkeypatch):
    seen = []
    monkeypatch.setattr(
        backends, "write_mixture", lambda student, teacher, *_, **__: seen.append((student, teacher)) or []
    )
    sampler = opd.OptimalSampler(model_teacher=str(folders[0]), model_theta=folders[0])
    list(sampler.stream(["one"]))
    module = seen[0][0]
    other = opd.OptimalSampler(model_teacher=module, model_theta=module, tokenizer=load_tokenizer(folders[0]))
    list(other.stream(["one"]))
    assert all(student is teacher is module for student, teacher in seen)


def test_a_stop_string_cuts_ids_text_and_log_probs_alike(sampler, scripted):
    scripted += [(0, "one plus two is three", None), (1, "one is </s>", None), (2, "one two", None)]
    output = sampler.generate(TEACHER_PROMPTS, stop="plus two", max_tokens=9)
    cut, ended, full = output.samples
    assert cut.response_ids == [IDS["one"], IDS["plus"], IDS["two"]] and cut.text == "one "
    assert (cut.mixture_log_probs, cut.student_log_probs) == ([0, -1, -2], [0, -2, -4])
    assert (cut.teacher_log_probs, cut.alphas) == ([0, -3, -6], [0, 0.1, 0.2])
    assert [s.finish_reason for s in output.samples] == ["stop", "stop", "length"]
    assert ended.text == "one is" and full.text == "one two"
    alphas = torch.tensor([*cut.alphas, *ended.alphas, *full.alphas])
    stats = output.alpha_stats
    assert (stats.mean, stats.std) == (
        pytest.approx(alphas.mean().item()),
        pytest.approx(alphas.std(correction=0).item()),
    )
    assert (stats.min, stats.max, stats.tokens) == (0, pytest.approx(0.2), 8)


def test_bad_rows_are_samples_with_an_error_and_the_others_go_on(sampler, scripted, caplog):
    scripted += [(3, "two </s>", None), (2, "one", "the teacher's logits are NaN")]
    with caplog.at_level(logging.WARNING):
        streamed = list(sampler.stream(["one", "", "two", "three"], [7, "one", "one", "one"]))
    assert [index for index, _ in streamed] == [0, 1, 3, 2]  # as they come
    samples = dict(streamed)
    assert samples[0].error.startswith("student's prompt: a prompt must be text")
    assert samples[1].error == "teacher's prompt: the prompt is empty"
    assert samples[2].error == "the teacher's logits are NaN"
    assert [(samples[i].finish_reason, samples[i].text) for i in range(4)] == [("error", "")] * 3 + [("stop", "two")]
    assert "prompt 2 is not answered: the teacher's logits are NaN" in caplog.text


def test_a_prompt_beyond_the_context_is_one_of_them(folders, sampler):
    output = sampler.generate(["one " * 300, "one"], ["one", "one"], max_tokens=2)
    assert "300 tokens leaves no room for an answer within 256" in output.samples[0].error
    assert output.samples[1].finish_reason in ("stop", "length")


def test_an_error_when_nothing_could_be_answered(sampler):
    with pytest.raises(
        UserError, match="None of the 2 prompts could be answered. prompt 0: teacher's prompt: the prompt"
    ):
        sampler.generate(["", " "])


def test_alphas_are_kept_on_request_only(folders, scripted):
    scripted.append((0, "one </s>", None))
    output = opd.OptimalSampler(model_teacher=folders[1], model_theta=folders[0]).generate(["one"])
    assert output.alpha_stats is None and output.samples[0].alphas is None
    assert output.generated_texts == ["one"]
