"""What is finished is not done again: answers, rewards, after any kind of end; and nothing that does not fit."""

import asyncio
import json
import logging
from dataclasses import replace

import pytest
import torch

from opd.rollout.journal import RolloutJournal
from opd.rollout.journal_values import NotKept, decoded, encoded
from opd.rollout.journaled import JournaledEngine, JournaledReward
from opd.types import GenerationRequest, GenerationResult, Sample, SampleStatus, SamplingParams, TopLogprobs

REQUESTS = [GenerationRequest(key=k, prompt_ids=(5, k)) for k in range(8, 12)]  # of step 3
PROBE = [-1.25, -0.5, -2.0]


class Engine:
    """Answers ``[key, noise]``; aborts key 11; may die after some answers."""

    def __init__(self, lives=99, version=2):
        self.lives, self.version, self.asked = lives, version, []

    def generate(self, requests, params):
        for request in requests:
            if self.lives == 0:
                raise SystemError("killed")
            self.lives -= 1
            self.asked.append(request.key)
            aborted = request.key == 11
            yield GenerationResult(
                key=request.key,
                response_ids=[] if aborted else [request.key, 7],
                log_probs=[] if aborted else [-0.1, -1 / 3],
                status=SampleStatus.ABORTED if aborted else SampleStatus.TRUNCATED,
                weight_version=self.version,
                top_ids=None if aborted else torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
            )

    def set_weights(self, named_tensors, *, version):
        self.version = version

    def verify(self, tokens, expected_logprobs, *, tolerance):
        return 0.0


def journal(folder, **changes):
    options = {"identity": {"rollout_seed": 42}, "resumed_step": 2}
    kept = RolloutJournal(folder / "journal", **options | changes)
    kept.begin(3)
    return kept


def start(folder, *, lives=99, probe=PROBE, version=2, **changes):
    """An engine that has just got ``version``, and its journal."""
    kept = journal(folder, **changes)
    inner = Engine(lives)
    engine = JournaledEngine(inner, kept)
    engine.set_weights([], version=version)
    engine.verify([1, 2, 3, 4], probe, tolerance=1.0)
    return engine, inner, kept


def write_and_stop(folder, answers=2):
    engine, inner, kept = start(folder, lives=answers)
    finished = []
    with pytest.raises(SystemError):
        finished.extend(iter(engine.generate(REQUESTS, SamplingParams())))
    return {r.key: r for r in finished}


def test_a_killed_rollout_goes_on_with_what_it_had(tmp_path):
    write_and_stop(tmp_path)
    engine, inner, _ = start(tmp_path)
    results = {r.key: r for r in engine.generate(REQUESTS, SamplingParams())}
    assert inner.asked == [10, 11]
    whole = {r.key: r for r in Engine().generate(REQUESTS, SamplingParams())}
    for key in (8, 9, 10):
        assert results[key].top_ids.equal(whole[key].top_ids)
    plain = [{k: replace(r, top_ids=None) for k, r in each.items()} for each in (results, whole)]
    assert plain[0] == plain[1]  # to the last bit, and an aborted one is tried again


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"probe": [-1.25, -0.5, -2.0000005]}, [8, 9, 10, 11]),
        ({"identity": {"rollout_seed": 43}}, [8, 9, 10, 11]),
        ({"version": 3, "max_staleness": 0}, [8, 9, 10, 11]),
        ({"resumed_step": 3, "version": 3, "max_staleness": 1}, [8, 9, 10, 11]),
    ],
    ids=["other weights", "other flags", "weights not known", "that step is learned"],
)
def test_what_does_not_fit_is_written_again(tmp_path, changes, asked):
    write_and_stop(tmp_path)
    engine, inner, _ = start(tmp_path, **changes)
    list(engine.generate(REQUESTS, SamplingParams()))
    assert inner.asked == asked


def test_another_prompt_under_the_same_number_is_another_request(tmp_path):
    write_and_stop(tmp_path)
    engine, inner, _ = start(tmp_path)
    changed = [replace(REQUESTS[0], prompt_ids=(5, 9)), replace(REQUESTS[1], teacher_prompt_ids=(1,)), *REQUESTS[2:]]
    list(engine.generate(changed, SamplingParams()))
    assert inner.asked == [8, 9, 10, 11]


@pytest.mark.parametrize(
    ("staleness", "beside", "asked"), [(1, True, [10, 11]), (1, False, [8, 9, 10, 11]), (0, True, [8, 9, 10, 11])]
)
def test_answers_of_weights_older_than_the_checkpoint(tmp_path, staleness, beside, asked):
    """Written ahead with version 1, for step 3; resumed from the checkpoint of step 2."""
    engine, _, kept = start(tmp_path, lives=2, version=1, resumed_step=0)
    with pytest.raises(SystemError):
        list(engine.generate(REQUESTS, SamplingParams()))
    options = {"max_staleness": staleness, "beside_checkpoint": beside}
    engine, inner, _ = start(tmp_path, probe=[-9.0], **options)
    list(engine.generate(REQUESTS, SamplingParams()))
    assert inner.asked == asked


def test_each_round_of_an_answer_is_kept(tmp_path):
    """--partial-rollout asks for the same answer again, with more of it written."""
    first, second = REQUESTS[0], replace(REQUESTS[0], prompt_ids=(5, 8, 8, 7), written=2)
    engine, _, kept = start(tmp_path)
    for request in (first, second):
        list(engine.generate([request], SamplingParams()))
    kept.close()
    engine, inner, _ = start(tmp_path)
    for request in (first, second, replace(second, written=1)):
        list(engine.generate([request], SamplingParams()))
    assert inner.asked == [8]  # the last: the same tokens, of which one more belongs to the prompt


@pytest.mark.parametrize("torn", [1, 30])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path, torn):
    write_and_stop(tmp_path)
    (file,) = (tmp_path / "journal").iterdir()
    file.write_bytes(file.read_bytes()[:-torn])
    engine, inner, kept = start(tmp_path)
    list(engine.generate(REQUESTS, SamplingParams()))
    assert inner.asked == [9, 10, 11]
    kept.close()
    engine, inner, _ = start(tmp_path)
    list(engine.generate(REQUESTS, SamplingParams()))
    assert inner.asked == [11]


def sample(index=8, tokens=(5, 8, 1, 2)):
    return Sample(index=index, group_index=0, prompt="", tokens=list(tokens), response_length=2, label="3")


def scored(folder, reward, given):
    kept = journal(folder)
    try:
        return asyncio.run(JournaledReward(reward, kept)(None, given))
    finally:
        kept.close()


def test_a_score_is_paid_once(tmp_path):
    asked = []
    top = TopLogprobs(ids_TK=torch.tensor([[1, -1], [2, 3]]), logprobs_TK=torch.tensor([[-0.1, 0.0], [-1 / 3, -2.0]]))

    async def reward(args, sample):
        asked.append(sample.index)
        sample.metadata["note"] = "judged"
        return {"task_reward": 1.0, "teacher_log_probs": [-0.1, -1 / 3], "teacher_error": None, "teacher_top": top}

    first = scored(tmp_path, reward, sample())
    again = sample()
    second = scored(tmp_path, reward, again)
    assert (asked, again.metadata) == ([8], {"note": "judged"})
    assert second["teacher_log_probs"] == first["teacher_log_probs"]
    assert second["teacher_top"].ids_TK.equal(top.ids_TK) and second["teacher_top"].logprobs_TK.equal(top.logprobs_TK)
    scored(tmp_path, reward, sample(tokens=(5, 8, 1, 3)))  # another answer
    assert asked == [8, 8]


def test_a_score_that_the_teacher_failed_to_give_is_asked_for_again(tmp_path):
    asked = []

    async def reward(args, sample):
        asked.append(sample.index)
        return {"task_reward": 1.0, "teacher_log_probs": None, "teacher_error": "timeout"}

    for _ in range(2):
        scored(tmp_path, reward, sample())
    assert asked == [8, 8]


def test_a_score_that_comes_at_the_second_try_is_kept(tmp_path):
    class Teacher:
        tries = 0

        async def score_again(self, args, sample):
            self.tries += 1
            return {"task_reward": 1.0, "teacher_log_probs": [-1.0, -2.0], "teacher_error": None}

        async def __call__(self, args, sample):
            return await self.score_again(args, sample)

        def unscored(self, sample):
            return sample.reward is None

    teacher, kept = Teacher(), journal(tmp_path)
    reward = JournaledReward(teacher, kept)
    assert reward.unscored(sample())
    first = asyncio.run(reward.score_again(None, sample()))
    kept.close()
    assert asyncio.run(JournaledReward(teacher, journal(tmp_path))(None, sample())) == first
    assert teacher.tries == 1


def test_a_full_disk_costs_the_journal_only(tmp_path, caplog):
    (tmp_path / "journal").write_text("a file where the folder should be")
    engine, inner, _ = start(tmp_path)
    with caplog.at_level(logging.WARNING):
        results = list(engine.generate(REQUESTS, SamplingParams()))
    assert (len(results), len(caplog.records)) == (4, 1)
    assert "cannot be written from here on" in caplog.text


def test_a_checkpoint_replaces_the_journals_before_it(tmp_path):
    kept = journal(tmp_path, resumed_step=0)
    for step in (1, 2, 3):
        kept.begin(step)
        kept.keep_reward(sample(), 1.0, metadata={})
    kept.superseded(2)
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["step_0000003.jsonl"]
    kept.keep_reward(sample(9), 1.0, metadata={})
    kept.close()
    assert journal(tmp_path).reward(sample(9)) == 1.0


def test_without_checkpoints_in_between_only_the_last_journals_stay(tmp_path):
    kept = journal(tmp_path, resumed_step=0, keep_steps=1)
    for step in (1, 2, 3, 4):
        kept.begin(step)
        kept.keep_reward(sample(), 1.0, metadata={})
    names = sorted(path.name for path in (tmp_path / "journal").iterdir())
    assert names == ["step_0000003.jsonl", "step_0000004.jsonl"]


@pytest.mark.parametrize(
    "values",
    [
        [1 / 3, -0.0, 5e-324, float("inf")] * 9,
        [0, -(2**63), 2**63 - 1] * 9,
        [2**63] * 20,
        [1, 2.0] * 20,
        [True] * 20,
        [[0.5] * 20] * 2,
        [],
    ],
)
def test_long_lists_come_back_exactly_and_of_the_same_types(values):
    again = decoded(json.loads(json.dumps(encoded(values))))
    assert again == values
    assert [type(a) for a in again] == [type(v) for v in values]


def test_values_that_cannot_be_read_again_are_not_kept():
    assert decoded(encoded({"a": [None, {"b": (1, 2.5)}, True], "c": "x"})) == {
        "a": [None, {"b": [1, 2.5]}, True],
        "c": "x",
    }
    for value in (object(), {1: 2}, [torch.zeros(1, dtype=torch.bfloat16)]):
        with pytest.raises(NotKept):
            encoded(value)
