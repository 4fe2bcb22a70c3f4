"""How many prompts each rollout begins, which numbers their samples get, and who stays in flight."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from opd.config.schema import Config, OffPolicyFlags, RolloutFlags
from opd.data.prompts import Prompt
from opd.rollout.driver import RolloutDriver, keep_rewards
from opd.rollout.plan import RolloutPlanner, RolloutWriter
from opd.run_state import RunState
from opd.types import GenerationResult, Sample, SampleStatus, SamplingParams

ROWS = [Prompt(index=i, text="", ids=(5, i)) for i in range(40)]


class Data:
    def __init__(self):
        self.position = 0

    def all(self):
        return ROWS

    def take(self, n):
        self.position += n
        return ROWS[self.position - n : self.position]

    def take_samples(self, n, first_index):
        values = {"prompt": "", "tokens": [5, 1], "response_length": 1, "rollout_log_probs": [0.0], "off_policy": True}
        return [Sample(index=first_index + i, group_index=-1 - i, **values) for i in range(n)]

    def state(self):
        return {"position": self.position}


class Engine:
    """An answer to row ``r`` has ``r % 3 * 4 + 1`` tokens, of which a rollout may add 4."""

    def __init__(self):
        self.rounds = 0

    def generate(self, requests, params):
        self.rounds += 1
        for request in requests:
            row = request.prompt_ids[1]
            left = row % 3 * 4 + 1 - request.written
            count = min(left, params.pause_after or left)
            status = SampleStatus.COMPLETED if count == left else SampleStatus.PENDING
            yield GenerationResult(
                key=request.key, response_ids=[row] * count, log_probs=[-1.0] * count, status=status, weight_version=0
            )


class Progress:
    def __enter__(self):
        return SimpleNamespace(advance=lambda tokens: None)

    def __exit__(self, *_):
        return None


async def one(args, sample, **kwargs):
    return 1.0


def make_config(**changes) -> Config:
    values = {"rollout_batch_size": 4, "n_samples_per_prompt": 2, "num_rollout": 9, "rollout_max_response_len": 16}
    flags = values | {"partial_rollout": True, "over_sampling_batch_size": 6} | changes
    off_policy = flags.pop("off_policy", {})
    return Config(rollout=RolloutFlags(**flags), off_policy=OffPolicyFlags(**off_policy))


class Run:
    """The steps of a run, or of one that was resumed from ``state``, without training."""

    def __init__(self, config, state=None, *, leader=True):
        self.state = state or RunState()
        self.engine = Engine()
        driver = RolloutDriver(self.engine, reward=one, post_process=keep_rewards, args=None, decode=str)
        self.parts = SimpleNamespace(
            config=config,
            prompts=Data(),
            answers=Data() if config.off_policy.sft_data else None,
            rollout=driver if leader else None,
            reporter=SimpleNamespace(console=SimpleNamespace(rollout=lambda total: Progress())),
            train_sampling=SamplingParams(max_new_tokens=16, pause_after=config.partial_tokens),
            journal=None,
        )
        self.parts.prompts.position = (self.state.prompts or {"position": 0})["position"]
        self.driver = driver
        self.planner = RolloutPlanner(self.parts, self.state)
        self.writer = RolloutWriter(self.parts, self.state)

    def step(self):
        """(indices of the samples learned from, rows begun)."""
        plan = self.planner(self.state.step + 1)
        rolled = self.writer(plan)
        self.state = plan.after if rolled is None else plan.after.with_in_flight(rolled.in_flight)
        own = [] if rolled is None else [s for s in rolled.samples if not s.off_policy]
        self.metrics = {} if rolled is None else rolled.scoring
        self.texts = {s.index: s.response_ids for s in own}
        return [s.index for s in own], [prompt.index for prompt in plan.prompts]


@pytest.fixture
def start():
    runs = []

    def make(*args, **kwargs):
        runs.append(Run(*args, **kwargs))
        return runs[-1]

    yield make
    for run in runs:
        run.driver.close()


def test_as_many_prompts_are_begun_as_leave_and_each_is_written_as_without_the_flag(start):
    run, plain = start(make_config()), start(make_config(partial_rollout=False, over_sampling_batch_size=None))
    texts, expected, begun = {}, {}, []
    for _ in range(5):
        indices, rows = run.step()
        plain.step()
        assert len(indices) == 8 and not texts.keys() & set(indices)
        texts |= run.texts
        expected |= plain.texts
        begun.append(rows)
        assert [entry["row"] for entry in run.state.in_flight] == sorted(entry["row"] for entry in run.state.in_flight)
    assert begun == [list(range(6)), *(list(range(k, k + 4)) for k in (6, 10, 14, 18))]
    assert {k: v for k, v in texts.items() if k in expected} == {k: v for k, v in expected.items() if k in texts}
    assert len(texts.keys() & expected.keys()) > 30


def test_the_first_steps_by_hand(start):
    """Rows 0 ... 5 want 1, 2 and 3 rounds of 4 tokens in turn; 4 of them leave."""
    run = start(make_config())
    assert run.step()[0] == [0, 1, 2, 3, 6, 7, 8, 9]  # rows 0, 1, 3, 4: 2 rounds; 2 and 5 go on
    assert run.metrics == {"partial_share": 0.0, "partial_unfinished": 4, "partial_oldest": 0, "partial_rounds": 2}
    assert run.step()[0] == [4, 5, 10, 11, 12, 13, 18, 19]  # 2 and 5, then of 6 ... 9 those of one round
    assert run.metrics["partial_share"] == 4 * 8 / (4 * 9 + 4 * 1) and run.metrics["partial_oldest"] == 1


def test_a_resume_goes_on_with_what_is_in_flight(start):
    whole = start(make_config())
    steps = [whole.step() for _ in range(2)]
    resumed = start(make_config(), RunState.from_json(whole.state.to_json()))
    steps = [whole.step() for _ in range(3)]
    assert [resumed.step() for _ in range(3)] == steps
    assert resumed.texts == whole.texts and resumed.state == whole.state


def test_a_rank_that_does_not_write_begins_the_same_prompts(start):
    leader, other = start(make_config()), start(make_config(), leader=False)
    for _ in range(3):
        assert other.step()[1] == leader.step()[1]
    assert other.state == leader.state.with_in_flight([])


def test_a_resume_without_the_flag_finishes_them(start):
    run = start(make_config())
    run.step()
    after = start(make_config(partial_rollout=False, over_sampling_batch_size=None), run.state)
    indices, rows = after.step()
    assert (indices[:4], rows, after.engine.rounds, after.state.in_flight) == ([4, 5, 10, 11], [6, 7], 1, [])
    assert after.metrics == {}


def test_a_resume_with_a_smaller_batch_gives_no_number_twice(start):
    run = start(make_config())
    for _ in range(3):
        run.step()
    taken = {sample["index"] for entry in run.state.in_flight for sample in entry["samples"]}
    smaller = start(make_config(rollout_batch_size=2, over_sampling_batch_size=5), run.state)
    for _ in range(3):
        plan = smaller.planner(smaller.state.step + 1)
        assert len(plan.prompts) == (3 if smaller.state.step == 3 else 2)
        assert min(plan.first_indices) > max(taken)
        taken |= {index + i for index in plan.first_indices for i in range(2)}
        smaller.state = plan.after


def test_answers_from_a_file_stand_where_they_stand_without_the_flag(start):
    off_policy = {"sft_data": "answers.jsonl", "sft_steps": 1, "opd_off_policy_fraction": 0.25}
    run = start(make_config(over_sampling_batch_size=5, off_policy=off_policy))
    assert run.step() == ([], [])  # the warm-up begins nothing
    planned = [run.planner(step) for step in (2, 3)]
    assert [plan.first_indices for plan in planned] == [[8, 10, 12, 16], [18, 20, 24]]  # 14, 15, 22, 23: the file's
    assert [[s.index for s in plan.answers] for plan in planned] == [[14, 15], [22, 23]]
    assert [plan.leaving for plan in planned] == [3, 3]
