"""slime's two function paths: what a sample carries afterwards, with and without a teacher score."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd.rewards.on_policy_distillation import post_process_rewards, reward_func, take_teacher_stats
from opd.types import Sample
from tests.unit.serving.fake_sglang import FakeSGLang, good_answer, logprob_of, rows_of

pytestmark = pytest.mark.unit

TOKENS = [11, 12, 13, 14, 15]


def _sample(response_length: int, reward: Any = None, **fields: Any) -> Any:
    return SimpleNamespace(
        tokens=list(TOKENS), response_length=response_length, reward=reward, label="23", response="# 23", **fields
    )


def _expected(response_length: int) -> list[float]:
    first = len(TOKENS) - response_length
    return [logprob_of(i, TOKENS[i]) for i in range(first, len(TOKENS))]


async def _seven(args: Any, sample: Any) -> float:
    return 7.0


def _reward(fake: FakeSGLang, sample: Any, task_reward: Any = None, **args: Any) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        async with fake.running():
            namespace = SimpleNamespace(rm_url=f"{fake.url}/generate", opd_teacher_retries=0, **args)
            return await reward_func(namespace, sample, task_reward=task_reward)

    return asyncio.run(run())


def test_score_and_task_reward_come_together() -> None:
    reward = _reward(FakeSGLang(), _sample(3), _seven)
    assert reward == {"task_reward": 7.0, "teacher_log_probs": _expected(3), "teacher_error": None}


def test_the_task_reward_survives_a_failed_teacher() -> None:
    reward = _reward(FakeSGLang(400), _sample(3), _seven)
    assert reward["task_reward"] == 7.0
    assert reward["teacher_log_probs"] is None
    assert reward["teacher_error"].startswith("http_status: ")


def test_the_rule_of_rm_type_is_used_and_none_means_zero() -> None:
    assert _reward(FakeSGLang(), _sample(3), rm_type="final_answer")["task_reward"] == 1.0
    assert _reward(FakeSGLang(), _sample(3), rm_type=None)["task_reward"] == 0.0
    assert _reward(FakeSGLang(), _sample(3))["task_reward"] == 0.0


def test_a_failing_task_rule_is_not_hidden() -> None:
    async def broken(args: Any, sample: Any) -> float:
        raise ZeroDivisionError("rule")

    with pytest.raises(ZeroDivisionError):
        _reward(FakeSGLang(), _sample(3), broken)


def test_one_client_per_loop_serves_all_samples() -> None:
    fake = FakeSGLang()
    take_teacher_stats()

    async def run() -> None:
        async with fake.running():
            args = SimpleNamespace(rm_url=fake.url, opd_teacher_concurrency=2)
            await asyncio.gather(*(reward_func(args, _sample(n % 4)) for n in range(12)))
            stats = take_teacher_stats()
            assert sum(len(rows_of(request)) for request in fake.requests) == 9  # an empty response asks nothing
            assert stats["requests"] == len(fake.requests)
            assert 0 < stats["latency_p50"] <= stats["latency_p99"]
            assert take_teacher_stats()["requests"] == 0

    asyncio.run(run())
    assert fake.most_in_flight <= 2


def test_post_processing_our_dicts() -> None:
    scored = _sample(2, {"task_reward": 1.0, "teacher_log_probs": [-1.0, -2.0], "teacher_error": None})
    empty = _sample(0, {"task_reward": 0.5, "teacher_log_probs": [], "teacher_error": None})
    failed = _sample(2, {"task_reward": 0.25, "teacher_log_probs": None, "teacher_error": "timeout: slow"})
    misfit = _sample(3, {"task_reward": 0.0, "teacher_log_probs": [-1.0], "teacher_error": None})
    samples = [scored, empty, failed, misfit]
    assert post_process_rewards(SimpleNamespace(), samples) == ([1.0, 0.5, 0.25, 0.0], [1.0, 0.5, 0.25, 0.0])
    assert scored.teacher_log_probs.dtype == torch.float32
    assert scored.teacher_log_probs.tolist() == [-1.0, -2.0]
    assert empty.teacher_log_probs.shape == (0,)
    assert failed.teacher_log_probs is None
    assert misfit.teacher_log_probs is None
    assert [s.reward for s in samples] == [1.0, 0.5, 0.25, 0.0]


def test_a_task_reward_of_several_fields_reaches_the_users_post_processing() -> None:
    async def fields(args: Any, sample: Any) -> dict[str, float]:
        return {"correct": 1.0, "short": 0.5}

    sample = _sample(3)
    sample.reward = _reward(FakeSGLang(), sample, fields)
    post_process_rewards(SimpleNamespace(), [sample])
    assert sample.reward == {"correct": 1.0, "short": 0.5}
    assert sample.teacher_log_probs.tolist() == pytest.approx(_expected(3))


def test_inside_slime_an_unscored_sample_leaves_the_loss_with_a_tensor() -> None:
    reward = {"task_reward": 1.0, "teacher_log_probs": None, "teacher_error": "timeout: slow"}
    sample = _sample(3, reward, remove_sample=False)
    post_process_rewards(SimpleNamespace(), [sample])
    assert sample.remove_sample is True
    assert sample.teacher_log_probs.tolist() == [0.0, 0.0, 0.0]
    assert sample.reward == 1.0


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("response_length", [0, 1, 3])
def test_post_processing_raw_answers_of_the_server(start: int, response_length: int) -> None:
    sample = _sample(response_length, good_answer({"input_ids": TOKENS, "logprob_start_len": start}))
    assert post_process_rewards(SimpleNamespace(reward_key=None), [sample]) == ([0.0], [0.0])
    assert sample.teacher_log_probs.tolist() == pytest.approx(_expected(response_length))
    assert len(sample.teacher_log_probs) == response_length


def test_post_processing_a_broken_raw_answer() -> None:
    answer = good_answer({"input_ids": [1, 2, 3], "logprob_start_len": 0})
    sample = _sample(3, answer)
    assert post_process_rewards(SimpleNamespace(), [sample]) == ([0.0], [0.0])
    assert sample.teacher_log_probs is None


def test_an_aborted_sample_keeps_its_number() -> None:
    sample = Sample(index=0, group_index=0, prompt="p", tokens=list(TOKENS), response_length=2, reward=0.0)
    assert post_process_rewards(SimpleNamespace(), [sample]) == ([0.0], [0.0])
    assert sample.teacher_log_probs is None
