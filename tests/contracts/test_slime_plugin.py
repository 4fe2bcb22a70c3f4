"""slime's hooks one after the other, as its manager and trainer call them, on a real SGLang server.

Student and teacher are the same model, and so is their mixture: every number is known.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from opd.plugins.slime import compute_advantages, generate_rollout, post_process_rewards
from opd.serving.server import SGLangServer
from tests.contracts.conftest import TinyModel
from tests.unit.plugins.slime_objects import DataSource, Sample, slime_args

pytestmark = pytest.mark.contracts

LENGTH = 6
TOP_K = 40


@pytest.fixture(scope="module")
def run(server: SGLangServer, tiny_a: TinyModel) -> Any:
    address = urlsplit(server.url)
    return slime_args(
        hf_checkpoint=str(tiny_a.folder),
        sglang_router_ip=address.hostname,
        sglang_router_port=address.port,
        rm_url=f"{server.url}/generate",
        custom_rm_path="opd.plugins.slime.reward_func",
        rm_type="exact",
        rollout_max_response_len=LENGTH,
        mixture_top_k=TOP_K,
    )


@pytest.fixture(scope="module")
def groups(run: Any) -> list[list[Sample]]:
    prompts = [Sample(prompt="one and one", label="2"), Sample(prompt="a longer prompt", label="")]
    return generate_rollout(run, 0, DataSource(run, prompts))


def test_samples_carry_what_slime_needs(groups: list[list[Sample]], tiny_a: TinyModel) -> None:
    assert [[sample.index for sample in group] for group in groups] == [[0, 1], [2, 3]]
    for sample in (sample for group in groups for sample in group):
        prompt = tiny_a.tokenizer.encode(sample.prompt, add_special_tokens=False)
        assert sample.tokens[: len(prompt)] == prompt
        assert len(sample.tokens) == len(prompt) + sample.response_length
        assert 0 < sample.response_length <= LENGTH
        assert len(sample.rollout_log_probs) == sample.response_length
        ended = sample.tokens[-1] == tiny_a.tokenizer.eos_token_id
        assert sample.status is (Sample.Status.COMPLETED if ended else Sample.Status.TRUNCATED)
        assert sample.response == tiny_a.tokenizer.decode(sample.tokens[len(prompt) :])


def test_the_rollouts_logprobs_are_those_of_the_mixture(groups: list[list[Sample]], tiny_a: TinyModel) -> None:
    known = len(tiny_a.tokenizer)
    for sample in (sample for group in groups for sample in group):
        start = len(sample.tokens) - sample.response_length
        rows_TV = tiny_a.all_logprobs(sample.tokens)[start - 1 : -1]
        likely = rows_TV.topk(TOP_K)
        for row, ids, values, token, found in zip(
            rows_TV, likely.indices, likely.values, sample.tokens[start:], sample.rollout_log_probs, strict=True
        ):
            assert token in ids and token < known
            assert found == pytest.approx(float(row[token] - values[ids < known].logsumexp(0)), abs=2e-3)


def test_the_students_own_teacher_leaves_the_task_reward_alone(
    run: Any, groups: list[list[Sample]], tiny_a: TinyModel
) -> None:
    samples = [sample for group in groups for sample in group]
    raw, relative = post_process_rewards(run, samples)
    student = [
        torch.tensor(tiny_a.logprobs(sample.tokens)[len(sample.tokens) - sample.response_length - 1 :])
        for sample in samples
    ]
    data = {
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": relative,
        "log_probs": student,
        "teacher_log_probs": [sample.teacher_log_probs for sample in samples],
        "loss_masks": [[1] * sample.response_length for sample in samples],
    }
    compute_advantages(run, data)
    assert raw == [0.0] * 4
    for kl, advantages in zip(data["opd_reverse_kl"], data["advantages"], strict=True):
        torch.testing.assert_close(kl, torch.zeros_like(kl), atol=2e-3, rtol=0)
        torch.testing.assert_close(advantages, torch.zeros_like(kl), atol=2e-3, rtol=0)
