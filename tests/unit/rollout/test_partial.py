"""Answers set aside and continued: the same texts by every engine, who leaves when, and what is counted and masked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.data.batching import make_batch
from opd.data.prompts import Prompt
from opd.rollout.driver import RolloutDriver, keep_rewards
from opd.rollout.mixture_engine import MixtureEngine, ScaleSchedule
from opd.rollout.partial import continue_with, mask_earlier_tokens, new_group, new_sample, partial_metrics
from opd.rollout.score_wait import ScoreWait
from opd.rollout.speculative_kd import SpeculativeKDEngine
from opd.rollout.staleness import staleness_metrics
from opd.rollout.torch_engine import TorchEngine
from opd.types import GenerationResult, Mixture, SampleStatus, SamplingParams
from tests.unit.decoding.enumerated_mixture import make_model

COUNT = 3  # answers per prompt
LENGTH = 14
PROMPTS = [
    Prompt(index=1, text="a", ids=(2, 3)),
    Prompt(index=2, text="b", ids=(4,), mixture_ids=(3, 0, 2)),
    Prompt(index=3, text="c", ids=(2, 0, 3)),
    Prompt(index=4, text="d", ids=(3, 3)),
]


def groups(prompts=PROMPTS, first_step=1):
    return [
        new_group(prompt, first_index=COUNT * g, count=COUNT, first_step=first_step) for g, prompt in enumerate(prompts)
    ]


def params(**changes):
    values = {"temperature": 1.5, "max_new_tokens": LENGTH, "stop_token_ids": (1,), "seed": 3}
    return SamplingParams(**values | changes)


async def length_reward(args, sample, **kwargs):
    args.append(sample.index)
    return float(sample.response_length)


def make_driver(engine, asked):
    return RolloutDriver(engine, reward=length_reward, post_process=keep_rewards, args=asked, decode=str)


def make_engine(kind):
    student = TorchEngine(make_model(0), max_running_requests=5, max_context_len=40)
    if kind == "torch":
        return student, student
    teacher = make_model(1, 24)
    if kind == "speculative_kd":
        return SpeculativeKDEngine(student, teacher, top_k=2), student
    settings = {"schedule": ScaleSchedule(), "decoding": kind, "teacher_max_context_len": 40}
    return MixtureEngine(student, teacher, Mixture(), **settings), student


def written(sample):
    return sample.tokens, sample.response, sample.status, sample.reward


@pytest.mark.parametrize("kind", ["torch", "speculative_kd", "lockstep", "speculative"])
def test_an_answer_in_pieces_is_the_answer_in_one(kind):
    engine, student = make_engine(kind)
    asked = []
    driver = make_driver(engine, asked)
    try:
        sampling = params(top_ids=2 if kind == "torch" else 0)
        whole = {s.index: s for s in driver.write(groups(), leaving=4, params=sampling)[0].samples}
        asked.clear()
        pieces, left, rollouts = {}, groups(), 0
        while left:
            student.weight_version = rollouts
            result, left = driver.write(left, leaving=1, params=replace(sampling, pause_after=3))
            assert [s.group_index for s in result.samples] == [0] * COUNT
            pieces |= {s.index: s for s in result.samples}
            rollouts += 1
    finally:
        driver.close()
    assert rollouts == 4
    assert {k: written(s) for k, s in pieces.items()} == {k: written(s) for k, s in whole.items()}
    assert sorted(asked) == sorted(whole)  # once each
    assert len({s.response_length for s in whole.values()}) > 3
    for key, sample in pieces.items():
        assert sample.rollout_log_probs == pytest.approx(whole[key].rollout_log_probs, abs=1e-4)
        assert (sample.student_top_ids is None) == (kind != "torch")
        assert kind != "torch" or sample.student_top_ids.equal(whole[key].student_top_ids)
    spans = [s.weight_spans for s in pieces.values() if s.weight_spans]
    assert any(len(versions) > 1 for versions in spans)  # finished by other weights than those that began them
    assert {start for versions in spans for start, _ in versions} <= {0, 3, 6, 9, 12}


class Script:
    """Writes answer ``key`` until it has ``lengths[key]`` tokens, the last of them 9."""

    def __init__(self, lengths):
        self.lengths, self.version, self.asked = lengths, 0, []

    def generate(self, requests, params):
        self.asked.append([(request.key, request.written) for request in requests])
        for request in requests:
            left = self.lengths[request.key] - request.written
            count = min(left, params.pause_after)
            yield GenerationResult(
                key=request.key,
                response_ids=[7] * (count - 1) + [9 if count == left else 7],
                log_probs=[-float(self.version)] * count,
                status=SampleStatus.COMPLETED if count == left else SampleStatus.PENDING,
                weight_version=self.version,
            )


def test_who_leaves_and_who_goes_on():
    engine, asked = Script(dict.fromkeys(range(12), 3) | {1: 9, 6: 11}), []
    driver = make_driver(engine, asked)
    try:
        first, left = driver.write(groups(), leaving=2, params=params(pause_after=4))
        assert [s.index for s in first.samples] == [3, 4, 5, 9, 10, 11]  # the first complete ones
        assert [[s.index for s in group.samples] for group in left] == [[0, 1, 2], [6, 7, 8]]
        assert len(engine.asked) == first.rounds == 1 and sorted(asked) == [0, 2, 3, 4, 5, 7, 8, 9, 10, 11]
        assert [s.reward for s in left[0].samples] == [3.0, None, 3.0]

        second, left = driver.write(left, leaving=1, params=params(pause_after=4))
        assert engine.asked[1:] == [[(1, 4), (6, 4)], [(1, 8), (6, 8)]]  # a second round, as none was complete
        assert [s.index for s in second.samples] == [0, 1, 2] and second.rounds == 2
        assert left[0].complete and sorted(asked[10:]) == [1, 6]

        third, left = driver.write(left, leaving=1, params=params(pause_after=4))
        assert len(engine.asked) == 3 and len(asked) == 12  # it had only waited for its turn
        assert third.rewards == [11.0, 3.0, 3.0] and left == []
    finally:
        driver.close()


class Away:
    """A teacher who gives no score until it is asked again."""

    def __init__(self):
        self.again = []

    async def __call__(self, args, sample, **kwargs):
        return {"away": True}

    def unscored(self, sample):
        return isinstance(sample.reward, dict)

    may_be_scored = unscored

    async def score_again(self, args, sample):
        self.again.append(sample.index)
        return 2.0


def test_the_next_rollout_asks_again_for_what_the_last_one_did_not_get():
    scorer = Away()
    wait = ScoreWait(scorer=scorer, largest_share=1.0, seconds=0.0)
    driver = RolloutDriver(
        Script({0: 9, 1: 3, 2: 3}), reward=scorer, post_process=keep_rewards, args=None, decode=str, score_wait=wait
    )
    try:
        _, left = driver.write(groups(PROMPTS[:1]), leaving=0, params=params(pause_after=4))
        left[0].samples[2].reward = None  # as after a resume whose checkpoint could not keep it
        assert scorer.again == []
        _, left = driver.write(left, leaving=0, params=params(pause_after=4))
        assert scorer.again == [1]
        assert [s.reward for s in left[0].samples] == [None, 2.0, {"away": True}]
    finally:
        driver.close()


def test_an_answer_that_the_engine_loses_on_the_way_is_left_out():
    sample = new_sample(PROMPTS[0], 5)
    piece = GenerationResult(
        key=5, response_ids=[7, 7], log_probs=[-1.0, -2.0], status=SampleStatus.PENDING, weight_version=3
    )
    continue_with(sample, piece)
    assert sample.status is SampleStatus.PENDING and sample.trainable
    continue_with(sample, replace(piece, response_ids=[], log_probs=[], status=SampleStatus.ABORTED))
    assert not sample.trainable
    assert (sample.response_ids, sample.rollout_log_probs, sample.weight_version) == ([7, 7], [-1.0, -2.0], 3)


def test_pieces_of_several_weights_each_are_told_apart():
    sample = new_sample(PROMPTS[0], 0)
    piece = GenerationResult(key=0, response_ids=[7] * 4, log_probs=[0.0] * 4, status=SampleStatus.PENDING)
    continue_with(sample, replace(piece, weight_version=4, weight_spans=[(0, 3), (3, 4)]))
    continue_with(sample, replace(piece, weight_version=6, weight_spans=[(0, 4), (2, 6)]))
    assert sample.weight_spans == [(0, 3), (3, 4), (6, 6)] and sample.weight_version == 6
    sample.status = SampleStatus.COMPLETED
    (group,) = groups(PROMPTS[:1])
    group.samples = [sample]
    rolled = type("Rolled", (), {"samples": [sample]})
    assert staleness_metrics(rolled, step=8) == {"staleness_mean": (4 * 3 + 3 * 3 + 1 * 2) / 8, "staleness_max": 4.0}


def test_what_earlier_rollouts_wrote_is_counted_and_can_be_masked():
    batch, (waiting,) = groups(PROMPTS[:1])[0].samples, groups(PROMPTS[1:2], first_step=2)
    for sample, length in zip(batch, (4, 2, 2), strict=True):
        result = GenerationResult(
            key=0, response_ids=[7] * length, log_probs=[-1.0] * length, status=SampleStatus.COMPLETED
        )
        continue_with(sample, result)
    earlier = {0: 3, 1: 2, 2: 0}
    (begun,) = groups(PROMPTS[:1])
    metrics = partial_metrics(batch, [begun, waiting], earlier, step=5, rounds=2)
    assert metrics == {
        "partial_share": 5 / 8,
        "partial_unfinished": 6.0,
        "partial_oldest": 4.0,
        "partial_rounds": 2.0,
    }
    mask_earlier_tokens(batch, earlier)
    made = make_batch(batch, torch.zeros(3), samples_per_step=3)
    assert made.loss_mask_T.tolist() == [0, 0, 0, 1, 0, 0, 1, 1]
