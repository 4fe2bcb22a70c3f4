"""A piece of an answer as SGLang is asked for it, and how its end is read."""

from __future__ import annotations

import pytest

from opd.rollout.sglang_answers import generate_payload, generation_result, room
from opd.types import GenerationRequest, SampleStatus, SamplingParams


@pytest.mark.parametrize(
    ("written", "context", "pause", "tokens", "pauses"),
    [
        (0, 100, None, 20, False),
        (0, 100, 6, 6, True),
        (15, 100, 6, 5, False),  # the rest of the answer
        (14, 100, 6, 6, False),  # exactly the rest
        (4, 9, 6, 3, False),  # the rest of the context
        (4, 100, 6, 6, True),
    ],
)
def test_how_much_is_asked_for(written, context, pause, tokens, pauses):
    request = GenerationRequest(key=3, prompt_ids=(2, 3, *[7] * written), written=written)
    params = SamplingParams(max_new_tokens=20, pause_after=pause)
    payload = generate_payload(request, params, max_context_len=context)
    assert payload["input_ids"] == [2, 3] + [7] * written
    assert payload["sampling_params"]["max_new_tokens"] == tokens
    assert room(request, params, max_context_len=context) == (tokens, pauses)


@pytest.mark.parametrize(
    ("reason", "pauses", "status"),
    [
        ("length", True, SampleStatus.PENDING),
        ("length", False, SampleStatus.TRUNCATED),
        ("stop", True, SampleStatus.COMPLETED),
        ("abort", True, SampleStatus.ABORTED),
    ],
)
def test_an_answer_that_was_cut_by_us_is_not_finished(reason, pauses, status):
    meta = {
        "finish_reason": {"type": reason},
        "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None]],
        "weight_version": "4",
    }
    request = GenerationRequest(key=3, prompt_ids=(2, 3, 9), written=1)
    answer = {"output_ids": [7, 8], "meta_info": meta}
    result = generation_result(answer, request, url="http://server", top_ids=0, given_version=4, pauses=pauses)
    assert (result.status, result.response_ids, result.log_probs) == (status, [7, 8], [-0.5, -1.5])
    assert result.weight_spans == [(0, 4)]
