"""Rollouts in the background: their order, what the step sees of them, and how they end."""

import threading
import time
from types import SimpleNamespace

import pytest

from opd.errors import EngineError
from opd.rollout.ahead import BackgroundRollouts, Taken
from opd.rollout.line import RolloutLine
from opd.rollout.staleness import staleness_metrics
from opd.run_state import RunState
from opd.types import Sample, SampleStatus


@pytest.fixture
def background():
    rollouts = BackgroundRollouts()
    yield rollouts
    rollouts.close()


def test_a_rollout_is_written_while_its_taker_does_something_else(background):
    written = threading.Event()
    background.start(lambda: written.set() or "answers")
    assert written.wait(5)
    background.drain()
    taken = background.take()
    assert (taken.result, len(background)) == ("answers", 0)
    assert taken.seconds_waited < 1


def test_jobs_run_one_at_a_time_in_their_order(background):
    gate, log = threading.Event(), []
    background.start(lambda: (gate.wait(5), log.append("first"))[1])
    background.start(lambda: log.append("second"))
    assert (log, len(background)) == ([], 2)
    gate.set()
    background.drain()
    assert (log, len(background)) == (["first", "second"], 2)


def test_an_error_is_raised_where_the_rollout_is_taken_and_the_next_one_is_written(background):
    def fails():
        raise EngineError("the engine is gone")

    background.start(fails)
    background.start(lambda: 2)
    background.drain()
    with pytest.raises(EngineError, match="the engine is gone"):
        background.take()
    assert background.take().result == 2


def test_closing_ends_a_rollout_at_its_next_answer(background):
    answers = []

    def job():
        while True:
            background.check()
            answers.append(1)
            time.sleep(0.001)

    background.start(job)
    background.start(lambda: answers.append("never"))
    background.close()
    count = len(answers)
    time.sleep(0.02)
    assert len(answers) == count and "never" not in answers


def test_the_overlap_is_what_nobody_waited_for():
    assert Taken(result=None, seconds_waited=0.5, seconds_written=2.0).overlap_share == 0.75
    assert Taken(result=None, seconds_waited=3.0, seconds_written=2.0).overlap_share == 0.0
    assert Taken(result=None, seconds_waited=0.0, seconds_written=0.0).overlap_share == 0.0


class Run:
    """Counts as plans are made; a rollout is (step, weights that the engine held)."""

    def __init__(self):
        self.cursor, self.engine = 0, 0

    def plan(self, step):
        self.cursor += 10
        return SimpleNamespace(step=step, after=RunState(step=step, prompts={"position": self.cursor}))

    def write(self, plan, check=lambda tokens: None):
        return plan.step, self.engine

    def load(self, version):
        def load_weights():
            self.engine = version

        return load_weights


def test_two_ahead_get_their_weights_between_rollouts_and_a_resume_skips_nothing(background):
    run = Run()
    line = RolloutLine(run.plan, run.write, background, version=0)
    seen, cursors = [], []
    for step in range(1, 6):
        line.start_through(step)
        plan, taken = line.take()
        seen.append(taken.result)
        cursors.append(plan.after.prompts["position"])
        line.start_through(min(step + 2, 5), load_weights=run.load(step - 1) if step > 1 else None)
    assert seen == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)]  # staleness 0, 1, 2, 2, 2
    assert cursors == [10, 20, 30, 40, 50]  # of the step itself, not of what was taken ahead of it


def test_a_rank_that_does_not_write_moves_the_same_cursor():
    run = Run()
    line = RolloutLine(run.plan, run.write, None, version=3)
    line.start_through(5)
    plan, taken = line.take()
    assert (plan.step, taken.result, run.cursor, line.started_through) == (4, None, 20, 5)


def test_staleness_counts_updates_since_the_weights_that_wrote_an_answer():
    def sample(version, **changes):
        values = {"status": SampleStatus.COMPLETED, "response_length": 1, "weight_version": version} | changes
        return Sample(index=0, group_index=0, prompt="", **values)

    rolled = SimpleNamespace(
        samples=[
            sample(6),
            sample(5),
            sample(5),
            sample(6, response_length=3, weight_spans=[(0, 4), (1, 6)]),
            sample(None, off_policy=True),
            sample(0, status=SampleStatus.ABORTED),
        ]
    )
    assert staleness_metrics(rolled, step=7) == {"staleness_mean": (0 + 1 + 1 + 2 + 0 + 0) / 6, "staleness_max": 2.0}
    assert staleness_metrics(SimpleNamespace(samples=[]), step=7) == {}
