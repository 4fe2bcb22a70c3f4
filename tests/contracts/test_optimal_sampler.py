"""OptimalSampler over a real SGLang server, which is student and teacher at once with different prompts."""

from __future__ import annotations

import pytest

from opd import OptimalSampler
from tests.contracts.conftest import CONTEXT, VOCAB_SIZE, make_tokenizer

pytestmark = pytest.mark.contracts

TEACHER_PROMPTS, STUDENT_PROMPTS = ["Answer: 7. 3+4=", "", "Answer: 9. 4+5="], ["3+4=", "1+1=", "x" * CONTEXT]


def test_answers_of_both_prompts_and_errors_of_bad_rows(server, tiny_a):
    sampler = OptimalSampler(model_teacher=server.url, model_theta=server.url, draft_tokens=3, server_top_k=VOCAB_SIZE)
    try:
        output = sampler.generate(TEACHER_PROMPTS, STUDENT_PROMPTS, max_tokens=12)
    finally:
        sampler.close()
    good, empty, long = output.samples
    assert "the prompt is empty" in empty.error and f"within {CONTEXT} tokens" in long.error
    assert good.finish_reason in ("stop", "length") and good.text == sampler.tokenizer.decode(
        good.response_ids, skip_special_tokens=True
    )
    for prompt_ids, log_probs in (
        (good.student_prompt_ids, good.student_log_probs),
        (good.teacher_prompt_ids, good.teacher_log_probs),
    ):
        want = tiny_a.logprobs(prompt_ids + good.response_ids)[len(prompt_ids) - 1 :]
        assert log_probs == pytest.approx(want, abs=1e-3)
    assert output.stats.tokens == len(good.response_ids) and output.stats.tokens_per_round >= 1


def test_a_server_with_another_tokenizer_is_refused(server):
    with pytest.raises(ValueError, match="`model_theta` and `tokenizer` have different vocabularies .*, 256 differ"):
        OptimalSampler(model_teacher=server.url, model_theta=server.url, tokenizer=make_tokenizer(reverse=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(engine="lockstep"), "`engine='lockstep'` needs the models in this process"),
        (dict(max_context_len=CONTEXT + 1), f"`max_context_len={CONTEXT + 1}` is more than the {CONTEXT} positions"),
    ],
)
def test_what_servers_cannot_do(server, options, message):
    with pytest.raises(ValueError, match=message):
        OptimalSampler(model_teacher=server.url, model_theta=server.url, **options)
