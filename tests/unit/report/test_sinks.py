"""Dashboards: TensorBoard's files are read back by TensorBoard; W&B is replaced by a recorder (it needs an account)."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from opd.config.flags import ConfigError
from opd.report.sinks import TensorBoardSink, WandbSink, dashboard_name


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_files_can_be_read_back_at_every_step(tmp_path: Path) -> None:
    """Without waiting for ``close``: a killed run keeps its curves."""
    sink = TensorBoardSink(tmp_path)
    sink.log(0, {"step": 0, "eval_accuracy": 0.25})
    assert scalars(tmp_path) == {"eval/accuracy": [(0, 0.25)]}
    expected = {"eval/accuracy": [(0, 0.25)], "train/opd_reverse_kl": [], "time/train": []}
    for step in (1, 2, 3):
        sink.log(step, {"step": step, "opd_reverse_kl": 0.5, "time_train": 2.0, "grad_norm": None})
        expected["train/opd_reverse_kl"].append((step, 0.5))
        expected["time/train"].append((step, 2.0))
        assert scalars(tmp_path) == expected
    sink.close()
    assert scalars(tmp_path) == expected


def test_a_resumed_run_replaces_its_later_steps(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    for step in range(1, 6):
        first.log(step, {"reward_mean": 0.0})
    first.close()
    second = TensorBoardSink(tmp_path, start_step=3)
    for step in range(4, 7):
        second.log(step, {"reward_mean": 1.0})
    second.close()
    assert scalars(tmp_path)["train/reward_mean"] == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 1.0), (5, 1.0), (6, 1.0)]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("time_step", "time/step"),
        ("eval_accuracy", "eval/accuracy"),
        ("eval/a_accuracy", "eval/a_accuracy"),
        ("lr", "train/lr"),
    ],
)
def test_dashboard_names(name: str, shown: str) -> None:
    assert dashboard_name(name) == shown


class RecordedRun:
    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.id = kwargs["id"] or "new-id"
        self.kwargs = kwargs
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


FLAGS = {
    "lr": 0.1,
    "rm_url": "http://me:p@ss@a:1/generate,https://me:secret@b:2*3",
    "opd_teachers": ["math=http://me:secret@c:3/generate"],
    "sglang_server_args": "--max-total-tokens 4096 --api-key secret --admin-api-key=secret",
}


def test_wandb_run_is_continued_by_a_resume_and_told_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[RecordedRun] = []
    module = types.ModuleType("wandb")
    module.init = lambda **kwargs: runs.append(RecordedRun(kwargs)) or runs[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        sink = WandbSink(tmp_path, project="p", group="g", mode="offline", run_flags=FLAGS)
        sink.log(3, {"step": 3, "reward_mean": 0.5, "grad_norm": None})
        sink.close()
    assert [run.kwargs["id"] for run in runs] == [None, "new-id"]
    assert {key: runs[0].kwargs[key] for key in ("project", "group", "mode", "config")} == {
        "project": "p",
        "group": "g",
        "mode": "offline",
        "config": {
            "lr": 0.1,
            "rm_url": "http://a:1/generate,https://b:2*3",
            "opd_teachers": ["math=http://c:3/generate"],
            "sglang_server_args": "--max-total-tokens 4096 --api-key *** --admin-api-key=***",
        },
    }
    assert runs[0].logged == [(3, {"train/reward_mean": 0.5})]
    assert runs[0].finished


def test_wandb_that_is_not_installed_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="`--use-wandb` needs the wandb package.*pip install wandb"):
        WandbSink(tmp_path, project=None, group=None, mode="online", run_flags={})
