"""A teacher that is a function: how it is called, what it may return, and what its failures cost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from opd.data.prompts import Prompt
from opd.errors import ResultError, TeacherAwayError, TeacherError
from opd.rewards.on_policy_distillation import post_process_rewards
from opd.rewards.teacher_reward import TeacherReward
from opd.teachers.function_teacher import FunctionTeacher, checked_logprobs
from opd.types import Sample

pytestmark = pytest.mark.unit

SHOWN = "`--opd-custom-teacher-path=mine.score`"
ARGS = SimpleNamespace(floor=-3.0)
PROMPT = Prompt(index=1, text="1 + 1", ids=(5, 6, 7), label="2")


def sample(index: int = 0, length: int = 2) -> Sample:
    return Sample(index=index, group_index=0, prompt="", tokens=[5, 6, *range(length)], response_length=length)


def together(function: Callable[..., Any], samples: list[Sample]) -> list[Any]:
    """Log-probs of each, or the error, with all of them asked for at once."""
    teacher = FunctionTeacher(function, args=ARGS, shown=SHOWN)

    async def run() -> list[Any]:
        return await asyncio.gather(*(teacher.score(s) for s in samples), return_exceptions=True)

    try:
        return [s if isinstance(s, Exception) else s.logprobs for s in asyncio.run(run())]
    finally:
        teacher.close()


def test_a_plain_function_is_called_for_one_sample_at_a_time_in_a_thread_of_its_own() -> None:
    running, most, threads = [0], [0], set()

    def score(args: Any, sample: Any) -> list[float]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        threads.add(threading.current_thread().name)
        running[0] -= 1
        return [args.floor - sample.index] * sample.response_length

    assert together(score, [sample(i, length=i) for i in range(3)]) == [[], [-4.0], [-5.0, -5.0]]
    assert most == [1] and threads == {"custom teacher"}


def test_an_async_function_has_all_samples_that_wait() -> None:
    arrived: list[int] = []

    async def score(args: Any, sample: Any) -> list[float]:
        arrived.append(sample.index)
        while len(arrived) < 3:  # goes on only if the others are called meanwhile
            await asyncio.sleep(0.001)
        return [-1.0] * sample.response_length

    async def in_time() -> list[Any]:
        return await asyncio.wait_for(asyncio.to_thread(together, score, [sample(i) for i in range(3)]), timeout=20)

    assert asyncio.run(in_time()) == [[-1.0, -1.0]] * 3


@pytest.mark.parametrize(
    "value",
    [[-1.0, 0], (-1.0, 0.0), np.array([-1.0, 0.0]), torch.tensor([-1.0, 0.0]), list(np.float32([-1, 0])), [-1.0, 1e-4]],
)
def test_rows_of_any_kind_are_taken(value: Any) -> None:
    assert checked_logprobs(value, 2) == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (None, "returned NoneType: a list, array or tensor"),
        (-1.0, "returned float: a list"),
        ([-1.0], "returned 1 log-probs for a response of 2 tokens"),
        (torch.zeros(1, 2), "returned 1 log-probs"),
        (torch.zeros(2, 1), r"returned \[0.0\] for response token 0"),
        ([-1.0, None], "returned None for response token 1"),
        ([-1.0, float("nan")], "returned nan for response token 1"),
        ([float("-inf"), -1.0], "returned -inf for response token 0: .* floor"),
        ([-1.0, 0.3], "returned 0.3 for response token 1: a log-prob is finite and at most 0"),
    ],
)
def test_what_is_no_row_of_logprobs_is_said(value: Any, complaint: str) -> None:
    with pytest.raises(ResultError, match=complaint):
        checked_logprobs(value, 2)


def test_a_failure_names_function_sample_and_line_and_may_pass(caplog: pytest.LogCaptureFixture) -> None:
    def score(args: Any, sample: Any) -> list[float]:
        if sample.index == 7:
            raise KeyError("choices")
        return [-1.0] * (sample.response_length + (sample.index == 8))

    fine, raised, wrong = together(score, [sample(6), sample(7), sample(8)])
    assert fine == [-1.0, -1.0]
    assert isinstance(raised, TeacherAwayError)
    assert str(raised).startswith(f"{SHOWN} raised KeyError: 'choices' (test_function_teacher.py, line ")
    assert isinstance(wrong, TeacherError) and not isinstance(wrong, TeacherAwayError)
    assert "returned 3 log-probs for a response of 2 tokens" in str(wrong)
    assert [text.partition(":")[0] for text in caplog.messages] == ["sample 7", "sample 8"]


def test_a_sample_without_a_score_keeps_its_reward_and_is_asked_again_if_that_may_help() -> None:
    answers: list[Any] = [ConnectionError("down"), [-1.0, -2.0]]

    async def score(args: Any, sample: Any) -> list[float]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def rule(args: Any, sample: Sample) -> float:
        return 7.0

    teacher = FunctionTeacher(score, args=ARGS, shown=SHOWN)
    reward, one = TeacherReward(task_reward=rule, teachers=teacher), sample()
    one.reward = asyncio.run(reward(ARGS, one))
    assert reward.unscored(one) and reward.may_be_scored(one)
    one.reward = asyncio.run(reward.score_again(ARGS, one))
    assert post_process_rewards(ARGS, [one]) == ([7.0], [7.0])
    assert one.teacher_log_probs.tolist() == [-1.0, -2.0]
    numbers = teacher.take_stats()
    assert (numbers["requests"], numbers["failures"]) == (2, 1) and numbers["latency_p50"] <= numbers["seconds"]
    assert set(numbers) == {"requests", "failures", "seconds", "latency_p50", "latency_p95", "latency_p99"}
    teacher.close()


def test_the_trial_scores_a_short_answer_and_leaves_no_trace_in_the_numbers() -> None:
    seen: list[Sample] = []

    def score(args: Any, sample: Any) -> list[float]:
        seen.append(sample)
        return [-1.0] * sample.response_length

    teacher = FunctionTeacher(score, args=ARGS, shown=SHOWN)
    teacher.check(PROMPT)
    assert (seen[0].tokens, seen[0].response_length, seen[0].label) == ([5, 6, 7, 5, 6, 7], 3, "2")
    assert teacher.take_stats()["requests"] == 0
    teacher.close()


def test_a_function_that_fails_its_trial_is_refused_with_the_remedy() -> None:
    teacher = FunctionTeacher(lambda args, sample: [], args=ARGS, shown=SHOWN)
    with pytest.raises(TeacherError) as raised:
        teacher.check(PROMPT)
    teacher.close()
    assert str(raised.value) == (
        f"{SHOWN} returned 0 log-probs for a response of 3 tokens: one per response token is needed, none for the "
        "prompt. It was tried on the first prompt, answered with 3 tokens. Mend the function, or leave the trial out "
        "with --opd-skip-teacher-selftest"
    )
