"""Prompts in flight survive a checkpoint to the last bit; flags that cannot finish them are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from opd.config.flags import ConfigError
from opd.config.schema import Config, RolloutFlags
from opd.data.prompts import Prompt
from opd.rollout.partial import AnswerGroup, continue_with, new_group, new_sample
from opd.rollout.partial_state import check_in_flight, load_groups, save_group
from opd.run_state import RunState
from opd.types import GenerationResult, SampleStatus, TopLogprobs

PROMPTS = [Prompt(index=i, text=f"p{i}", ids=(5, i), label=str(i), metadata={"level": i}) for i in range(1, 4)]


class Data:
    def all(self):
        return PROMPTS


def piece(count, status, **changes):
    values = {
        "log_probs": [-1 / 3] * count,
        "top_ids": torch.tensor([[1, 2]] * count, dtype=torch.int32),
        "weight_version": 4,
    }
    return GenerationResult(key=0, response_ids=[7] * count, status=status, **values | changes)


def make_group() -> AnswerGroup:
    """One answer of each kind: set aside twice, finished and scored, lost, not begun."""
    group = new_group(PROMPTS[1], first_index=8, count=4, first_step=3)
    aside, scored, lost, _ = group.samples
    continue_with(aside, piece(20, SampleStatus.PENDING))
    continue_with(aside, piece(3, SampleStatus.PENDING, weight_version=5))
    continue_with(scored, piece(2, SampleStatus.COMPLETED))
    top = TopLogprobs(ids_TK=torch.tensor([[1, 2], [3, -1]]), logprobs_TK=torch.tensor([[-0.1, -1 / 3], [-2.0, 0.0]]))
    scored.reward = {"task_reward": 1.0, "teacher_log_probs": torch.tensor([-0.5, -0.25]), "teacher_top": top}
    scored.metadata["note"], scored.response = "judged", "seven"
    continue_with(lost, piece(0, SampleStatus.ABORTED))
    lost.reward = 0.0
    return group


def through_a_checkpoint(group: AnswerGroup) -> AnswerGroup:
    state = RunState(step=4).with_in_flight([save_group(group)])
    for sample in group.samples:  # what happens later is not in it
        sample.tokens.append(99)
    (again,) = load_groups(RunState.from_json(json.loads(json.dumps(state.to_json()))).in_flight, Data())
    for sample in group.samples:
        sample.tokens.pop()
    return again


def test_everything_that_is_written_and_scored_comes_back():
    group = make_group()
    again = through_a_checkpoint(group)
    assert (again.prompt, again.first_step) == (PROMPTS[1], 3)
    before, after = group.samples[1].reward, again.samples[1].reward
    assert after["teacher_log_probs"].equal(before["teacher_log_probs"])
    assert after["teacher_top"].logprobs_TK.equal(before["teacher_top"].logprobs_TK)
    group.samples[1].reward = again.samples[1].reward = None
    for sample, loaded in zip(group.samples[:2], again.samples[:2], strict=True):
        assert loaded.student_top_ids.equal(sample.student_top_ids)
    for sample in (*group.samples, *again.samples):
        sample.student_top_ids = None
    assert again.samples == group.samples
    assert again.samples[0].weight_spans == [(0, 4), (20, 5)]


def test_a_reward_that_cannot_be_written_down_is_computed_again():
    group = make_group()
    group.samples[1].reward = {"judge": object()}
    again = through_a_checkpoint(group).samples[1]
    assert (again.reward, again.metadata, again.status) == (None, {"level": 2}, SampleStatus.COMPLETED)


def flags(**changes) -> Config:
    return Config(rollout=RolloutFlags(**{"n_samples_per_prompt": 4, "rollout_max_response_len": 24} | changes))


@pytest.mark.parametrize(
    ("changes", "context", "message"),
    [
        ({"n_samples_per_prompt": 2}, 99, "`--n-samples-per-prompt=2` does not fit.* 4 answers each.* Give 4"),
        ({"rollout_max_response_len": 23}, 99, "`--rollout-max-response-len=23` leaves no room.* 23 tokens. Raise it"),
        ({}, 25, "`--rollout-max-context-len=25` leaves no room.* 25 tokens. Raise it"),
    ],
)
def test_flags_that_cannot_finish_them_are_refused(changes, context, message):
    saved = [save_group(make_group())]
    with pytest.raises(ConfigError, match=message):
        check_in_flight(saved, flags(**changes), max_context_len=context)
    check_in_flight(saved, flags(), max_context_len=26)


def test_a_finished_answer_needs_no_room():
    group = make_group()
    group.samples = [replace(sample, status=SampleStatus.TRUNCATED) for sample in group.samples]
    check_in_flight([save_group(group)], flags(rollout_max_response_len=1), max_context_len=2)
    assert new_sample(PROMPTS[0], 3).status is SampleStatus.PENDING
