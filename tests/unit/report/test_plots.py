"""curves.png is a real picture for every kind of run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from opd.report.metrics import MetricsWriter
from opd.report.plots import write_curves
from tests.unit.report.rows import learning_run


def ink(path: Path) -> list[float]:
    """Share of pixels that are not white in each quarter: accuracy, reverse KL, reward, time."""
    image = imread(path)[:, :, :3]
    height, width, _ = image.shape
    assert (height, width) == (770, 1210)
    halves = [half for rows in np.array_split(image, 2, axis=0) for half in np.array_split(rows, 2, axis=1)]
    return [float((half.min(axis=2) < 0.9).mean()) for half in halves]


def test_all_panels_are_drawn_from_the_file(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for row in learning_run(20):
        writer.append(row)
    write_curves(writer.path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 20_000
    assert min(ink(tmp_path / "curves.png")) > 0.01
    assert sorted(f.name for f in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_panels_without_data_say_so(tmp_path: Path) -> None:
    write_curves(learning_run(20), tmp_path / "all.png")
    write_curves(learning_run(20, evaluated=False, distilled=False), tmp_path / "few.png")
    all_ink, few_ink = ink(tmp_path / "all.png"), ink(tmp_path / "few.png")
    assert few_ink[0] < 0.8 * all_ink[0]
    assert few_ink[1] < 0.8 * all_ink[1]
    assert few_ink[2] == pytest.approx(all_ink[2], rel=0.2)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        learning_run(0),
        learning_run(1, evaluated=False),
        [{"step": 1, "reward_mean": None}],
        learning_run(250),  # too many steps for bars
        [row | {"eval/a_accuracy": 0.5, "eval/b_accuracy": 0.25} for row in learning_run(3)],
    ],
    ids=["nothing", "evaluation only", "one step", "only null", "long", "two sets"],
)
def test_unusual_runs(tmp_path: Path, rows: list[dict]) -> None:
    write_curves(rows, tmp_path / "curves.png")
    assert min(ink(tmp_path / "curves.png")) > 0.002


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    (tmp_path / "curves.png.tmp").mkdir()
    with pytest.raises(OSError):
        write_curves(learning_run(2), path)
    assert path.read_bytes() == b"old"
