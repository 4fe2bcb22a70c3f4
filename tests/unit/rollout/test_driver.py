import logging
import threading

import numpy as np
import pytest
import torch

from opd.data.prompts import Prompt
from opd.errors import RewardError
from opd.rollout.driver import RolloutDriver, keep_rewards
from opd.types import GenerationResult, SampleStatus, SamplingParams

PROMPTS = [
    Prompt(
        index=i,
        text=f"p{i}",
        ids=(5, 6 + i),
        label=str(i),
        metadata={"i": i},
        teacher_index=i,
        teacher_ids=(5, 6, 7) if i else None,
        mixture_ids=(8, 9) if i == 2 else None,
    )
    for i in range(3)
]


class ScriptedEngine:
    """Answers in reverse order; key 101 is aborted, and so are ``failing`` ones, who say why."""

    def __init__(self, before_last=lambda: None, failing=()):
        self.before_last = before_last
        self.failing = failing
        self.asked = []

    def generate(self, requests, params):
        self.asked += requests
        for request in reversed(requests):
            if request is requests[0]:
                self.before_last()
            aborted = request.key in (101, *self.failing)
            yield GenerationResult(
                key=request.key,
                response_ids=[] if aborted else [request.key, 9],
                log_probs=[] if aborted else [-1.0, -2.0],
                status=SampleStatus.ABORTED if aborted else SampleStatus.COMPLETED,
                weight_version=3,
                top_ids=None if aborted else torch.tensor([[request.key, 1], [9, 1]]),
                error=f"reason {request.key}" if request.key in self.failing else None,
            )

    def close(self):
        pass


async def label_reward(args, sample, **kwargs):
    return float(sample.label) + args["bonus"]


def run(reward=label_reward, post_process=keep_rewards, engine=None, **kwargs):
    driver = RolloutDriver(
        engine or ScriptedEngine(), reward=reward, post_process=post_process, args={"bonus": 10}, decode=str
    )
    try:
        return driver.run(PROMPTS, samples_per_prompt=2, first_index=100, params=SamplingParams(), **kwargs)
    finally:
        driver.close()


def test_samples_come_back_in_order_with_everything_filled_in():
    result = run()
    assert [s.index for s in result.samples] == list(range(100, 106))
    assert [s.group_index for s in result.samples] == [0, 0, 1, 1, 2, 2]
    assert result.rewards == [10, 0, 11, 11, 12, 12]  # 101 was aborted
    sample = result.samples[4]
    assert (sample.tokens, sample.response_length, sample.response_ids) == ([5, 8, 104, 9], 2, [104, 9])
    assert (sample.rollout_log_probs, sample.weight_version, sample.metadata) == ([-1.0, -2.0], 3, {"i": 2})
    assert result.samples[1].status is SampleStatus.ABORTED


def test_samples_carry_what_the_teacher_needs():
    first, *_, last = run().samples
    assert (first.teacher_index, first.teacher_prompt_ids) == (0, None)
    assert (last.teacher_index, last.teacher_prompt_ids) == (2, [5, 6, 7])
    assert last.student_top_ids.tolist() == [[105, 1], [9, 1]]


def test_a_teacher_that_helps_to_write_is_given_its_own_prompt():
    engine = ScriptedEngine()
    run(engine=engine)
    asked = [(r.key, r.prompt_ids, r.teacher_prompt_ids) for r in engine.asked]
    assert asked[0] == (100, (5, 6), None)
    assert asked[2] == (102, (5, 7), None)  # the prompt of the teacher that only scores is not for the engine
    assert asked[5] == (105, (5, 8), (8, 9))


def test_one_warning_names_the_first_reason_of_failed_answers(caplog):
    with caplog.at_level(logging.WARNING, "opd"):
        run()
        assert caplog.messages == []  # an engine that lost a request without a reason is not news of every rollout
        result = run(engine=ScriptedEngine(failing=(103, 104)))
    (message,) = caplog.messages
    assert message == "2 of 6 answers could not be written and are left out; the first is number 104: reason 104"
    assert result.rewards == [10, 0, 11, 0, 0, 12]


def test_rewards_run_while_the_engine_still_decodes():
    started = threading.Event()

    async def reward(args, sample, **kwargs):
        started.set()
        return 1.0

    overlapped = []
    run(reward, engine=ScriptedEngine(before_last=lambda: overlapped.append(started.wait(5))))
    assert overlapped == [True]


def test_post_processing_decides_what_the_estimator_uses_and_the_raw_reward_is_kept():
    def halve(args, samples, **kwargs):
        raw = [s.reward for s in samples]
        return raw, [r / 2 for r in raw]

    result = run(post_process=halve)
    assert result.samples[0].reward == 10 and result.rewards[0] == 5


def test_progress_hears_of_every_sample():
    tokens = []
    run(advance=tokens.append)
    assert sorted(tokens) == [0, 2, 2, 2, 2, 2]


def test_a_failing_reward_function_is_named():
    async def broken(args, sample, **kwargs):
        raise KeyError("answer")

    with pytest.raises(RewardError, match="reward function .*broken failed on sample 105: KeyError: 'answer'"):
        run(broken)


@pytest.mark.parametrize("value", ["good", float("nan"), float("-inf"), None])
def test_a_reward_that_is_no_finite_number_is_refused(value):
    async def odd(args, sample, **kwargs):
        return value

    with pytest.raises(RewardError, match=f"the reward of sample 100 is {value!r}: a finite number is needed"):
        run(odd)


def test_numbers_of_numpy_are_rewards():
    async def of_numpy(args, sample, **kwargs):
        return np.float32(0.5) if sample.index % 2 else np.int64(2)

    assert run(of_numpy).rewards == [2.0, 0.0, 2.0, 0.5, 2.0, 0.5]  # 101 was aborted
