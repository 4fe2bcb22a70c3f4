"""The Reporter ties everything together; a resumed run leaves the same record as an uninterrupted one."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from pathlib import Path

import pytest

from opd.config.schema import OutputFlags
from opd.report import Reporter, reporter
from opd.report.metrics import read_metrics
from opd.types import Sample
from tests.unit.report.rows import learning_run


def record(folder: Path, rows: list[dict], *, start_step: int = 0, **flags: object) -> str:
    stream = io.StringIO()
    output = OutputFlags(output_dir=str(folder), **flags)
    with Reporter(output, total_steps=10, start_step=start_step, stream=stream) as report:
        for row in rows:
            step = row["step"]
            report.step(step, {key: value for key, value in row.items() if key != "step"})
            sample = Sample(index=step, group_index=0, prompt="p", tokens=[1, 2], response_length=1)
            report.samples(step, [sample], {0: {}})
    return stream.getvalue()


def test_a_run_leaves_all_its_files_and_a_summary(tmp_path: Path) -> None:
    shown = record(tmp_path, learning_run(10))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png",
        "metrics.jsonl",
        "report.html",
        "run.json",
        "samples",
        "tensorboard",
    ]
    assert read_metrics(tmp_path / "metrics.jsonl") == learning_run(10)
    lines = shown.splitlines()
    assert lines[0] == "step  0/10  accuracy 34.0%"
    assert "accuracy 34.0% -> 44.0% (step 10)" in lines
    assert f"curves       {tmp_path}/curves.png" in lines


def test_a_resumed_run_leaves_the_same_record(tmp_path: Path) -> None:
    rows = learning_run(10)
    whole = record(tmp_path / "whole", rows)
    record(tmp_path / "resumed", rows[:8])
    resumed = record(tmp_path / "resumed", rows[6:], start_step=5)
    assert (tmp_path / "resumed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    saved = [sorted(path.name for path in (tmp_path / run / "samples").iterdir()) for run in ("whole", "resumed")]
    assert saved[0] == saved[1]
    summary = whole[whole.index("Training") :].replace("/whole/", "/resumed/")
    assert resumed.endswith(summary)


def test_a_fresh_run_keeps_the_record_of_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "write_curves", lambda *args: None)  # slow, and not the question here
    for steps in (3, 4, 5):
        record(tmp_path, learning_run(steps), use_tensorboard=False)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6
    assert len(read_metrics(tmp_path / "metrics.old-1.jsonl")) == 4
    assert len(read_metrics(tmp_path / "metrics.old-2.jsonl")) == 5


def test_an_error_in_the_loop_still_ends_in_a_summary(tmp_path: Path) -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        with Reporter(OutputFlags(output_dir=str(tmp_path)), total_steps=10, stream=stream) as report:
            for row in learning_run(2):
                report.step(row.pop("step"), row)
            raise KeyboardInterrupt
    assert "reverse KL 0.200 -> 0.190 nats/token (x0.95)" in stream.getvalue()
    assert (tmp_path / "curves.png").exists()


def test_a_full_disk_costs_the_pictures_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reporter, "write_curves", full_disk)
    monkeypatch.setattr(reporter, "write_samples", full_disk)
    monkeypatch.setattr(reporter.TensorBoardSink, "log", full_disk)
    shown = record(tmp_path, learning_run(3))
    for what in ("saved samples", "TensorBoard", "curves"):
        assert shown.count(f"warning: {what}: cannot be written from here on") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    assert "reverse KL" in shown


def test_without_an_output_dir_there_is_only_the_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    with Reporter(OutputFlags(), total_steps=1, stream=stream) as report:
        report.step(1, {"reward_mean": 0.5})
    assert stream.getvalue().startswith("step 1/1  reward 0.500\n")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_can_be_summed_up_afterwards(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.5}\n{"step": 2, "rew')
    command = [sys.executable, "-m", "opd.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "0.500 (step 1)" in done.stdout
    assert (tmp_path / "curves.png").exists()
    failed = subprocess.run([*command[:-1], str(tmp_path / "no")], capture_output=True, text=True, timeout=60)
    assert (failed.returncode, failed.stderr.startswith("error: cannot read metrics file")) == (2, True)
