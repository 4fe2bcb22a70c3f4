"""metrics.jsonl: whole lines only, a resumed run's file equals an uninterrupted one, full disks are reported."""

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path

import pytest
import torch

from opd.report.metrics import MetricsError, MetricsWriter, read_metrics


def write(folder: Path, steps: range) -> MetricsWriter:
    writer = MetricsWriter(folder)
    for step in steps:
        writer.append({"step": step, "reward_mean": step / 7})
    return writer


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.append({"step": 1, "reward_mean": 0.5, "tokens": torch.tensor(12), "opd_reverse_kl": torch.tensor(0.25)})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward_mean": 0.5, "tokens": 12, "opd_reverse_kl": 0.25}
    ]


def test_a_torn_last_line_is_dropped_on_open_and_ignored_by_readers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, range(1, 4)).close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 4, "rew')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    with caplog.at_level(logging.WARNING, "opd"):
        MetricsWriter(tmp_path).append({"step": 4})
    assert path.read_bytes() == whole + b'{"step": 4}\n'
    assert "half-written last line (16 bytes)" in caplog.text


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(0, 10)).close()
    write(tmp_path / "killed", range(0, 8)).close()
    resumed = MetricsWriter(tmp_path / "killed")
    assert resumed.truncate_after(4) == 3
    for step in range(5, 10):
        resumed.append({"step": step, "reward_mean": step / 7})
    files = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "killed")]
    assert files[0] == files[1]
    assert [f.name for f in (tmp_path / "killed").iterdir()] == ["metrics.jsonl"]


def test_truncating_nothing_leaves_the_file_alone(tmp_path: Path) -> None:
    writer = write(tmp_path, range(1, 4))
    inode = writer.path.stat().st_ino
    assert writer.truncate_after(3) == 0
    assert writer.path.stat().st_ino == inode


def test_nan_and_infinity_become_null_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"step": 3, "grad_norm": float("nan"), "policy_loss": torch.tensor(float("inf")), "reward_mean": 1.0}
    with caplog.at_level(logging.WARNING, "opd"):
        written = MetricsWriter(tmp_path).append(row)
    assert written == {"step": 3, "grad_norm": None, "policy_loss": None, "reward_mean": 1.0}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == written
    assert "step 3: not a finite number, recorded as null: grad_norm=nan, policy_loss=inf" in caplog.text


def test_a_full_disk_is_a_clear_error_and_leaves_whole_lines(tmp_path: Path) -> None:
    """A file-size limit makes the kernel take part of the line and refuse the rest, as a full disk does."""
    writer = write(tmp_path, range(1, 4))
    before = writer.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(MetricsError, match=r"cannot write metrics file .*metrics\.jsonl: File too large.*--load"):
            writer.append({"step": 4, "reward_mean": 0.123456789})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.path.read_bytes() == before
    writer.append({"step": 4})
    assert [row["step"] for row in read_metrics(writer.path)] == [1, 2, 3, 4]


def test_an_output_dir_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MetricsError, match="choose another --output-dir"):
        MetricsWriter(tmp_path / "file")


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"rubbish\n{"step": 3}\n')
    with pytest.raises(MetricsError, match=r"line 2 is not a metrics row .*rubbish"):
        read_metrics(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match="cannot read metrics file .*: No such file"):
        read_metrics(tmp_path / "metrics.jsonl")
