"""When a save that goes on in the background is heard of, and what its failure leads to."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from opd import step
from opd.config.schema import CheckpointFlags, Config, ParallelFlags
from opd.errors import UpdateError, UserError, WeightSyncError
from opd.megatron_backend.checkpoint_layout import CheckpointError
from opd.run_state import RunState
from opd.step import finish_save, save, saving_on_failure

pytestmark = pytest.mark.unit


class Saves:
    """The saving side of a trainer: what ``finished_save`` says of each save in turn, once it has to say something."""

    def __init__(self, *outcomes: bool) -> None:
        self.outcomes = list(outcomes)
        self.saved: list[int] = []
        self.under_way: int | None = None
        self.superseded: list[int] = []

    def save(self, iteration: int, *, extra: dict[str, Any]) -> None:
        assert self.under_way is None, "a save was begun before the one before it was over"
        self.saved.append(iteration)
        self.under_way = iteration

    def finished_save(self, *, wait: bool) -> int | None:
        if self.under_way is None or not wait:
            return None
        iteration, self.under_way = self.under_way, None
        if not self.outcomes.pop(0):
            raise CheckpointError("disk full")
        return iteration

    def from_first_rank(self, value: Any) -> Any:
        return value

    def parts(self) -> Any:
        journal = SimpleNamespace(superseded=self.superseded.append)
        config = Config(checkpoint=CheckpointFlags(save="folder"))
        return SimpleNamespace(config=config, trainer=self, critic=None, reporter=None, journal=journal)


def test_the_journal_keeps_a_step_until_its_checkpoint_is_complete() -> None:
    saves = Saves(True, True)
    assert save(saves.parts(), RunState(step=2), must=False)
    assert saves.superseded == []
    assert save(saves.parts(), RunState(step=4), must=False)  # waits for the one before
    assert saves.superseded == [2]
    assert finish_save(saves.parts(), wait=True)
    assert saves.superseded == [2, 4]


def test_a_failure_is_heard_of_after_the_step_and_is_no_end(caplog: pytest.LogCaptureFixture) -> None:
    saves = Saves(False, True)
    assert save(saves.parts(), RunState(step=2), must=False)
    assert not finish_save(saves.parts(), wait=True)
    assert "disk full. Training goes on" in caplog.text
    assert finish_save(saves.parts(), wait=True)  # and is told once
    assert saves.superseded == []


def test_the_last_save_must_succeed_and_is_waited_for() -> None:
    saves = Saves(True, False)
    assert save(saves.parts(), RunState(step=2), must=True)
    assert saves.superseded == [2]
    with pytest.raises(CheckpointError, match="disk full"):
        save(saves.parts(), RunState(step=3), must=True)


@pytest.mark.parametrize(("written", "saved"), [(True, [2]), (False, [2, 2])])
def test_a_run_that_is_stopped_waits_and_saves_again_what_failed(written: bool, saved: list[int]) -> None:
    saves = Saves(written, True)
    state = RunState(step=2)
    save(saves.parts(), state, must=False)
    with pytest.raises(UserError, match="mend me"), saving_on_failure(_with_stop(saves.parts()), state.saved()):
        raise UserError("mend me")
    assert saves.saved == saved and saves.under_way is None


@pytest.mark.parametrize(("everywhere", "saved"), [(True, [2]), (False, [])])
def test_several_ranks_save_what_stops_all_of_them(everywhere: bool, saved: list[int]) -> None:
    """A save takes all ranks, so one that failed alone cannot."""
    saves = Saves(True)
    parts = _with_stop(saves.parts())
    parts.config = replace(parts.config, parallel=ParallelFlags(actor_num_gpus_per_node=2))
    error = UserError("mend me")
    error.on_all_ranks = everywhere
    with pytest.raises(UserError, match="mend me"), saving_on_failure(parts, RunState(step=2)):
        raise error
    assert saves.saved == saved


def test_a_student_without_log_probs_is_not_saved() -> None:
    saves = Saves()
    with pytest.raises(UpdateError), saving_on_failure(_with_stop(saves.parts()), RunState(step=2)):
        raise UpdateError("the student's log-probs are NaN")
    assert saves.saved == []


def test_a_step_whose_weights_the_engine_refuses_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's own order of update and sync, with nothing to compute in between."""

    def refuse(*_: Any, **__: Any) -> float:
        raise WeightSyncError("somebody else gives the servers weights")

    saves = Saves(True)
    parts = _with_stop(saves.parts())
    parts.stop.interruptible = contextlib.nullcontext
    for name in ("load", "forward_logprobs", "map", "update"):
        setattr(saves, name, lambda *_: {})
    plan = SimpleNamespace(after=RunState(step=3))
    for name, result in (("next_rollout", (plan, None, {})), ("batch_metrics", {}), ("gate_metrics", {})):
        monkeypatch.setattr(step, name, lambda *_, result=result, **__: result)
    monkeypatch.setattr(step, "sync_weights", refuse)
    with pytest.raises(WeightSyncError):
        step.train_step(parts, RunState(step=2, on_disk=True), SimpleNamespace())
    assert saves.saved == [3]


def _with_stop(parts: Any) -> Any:
    parts.stop = SimpleNamespace(requested=False)
    return parts
