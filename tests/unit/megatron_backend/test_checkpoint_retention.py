"""Which checkpoints go and which stay; no torch involved."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.megatron_backend.checkpoint_layout import TRACKER, DirectoryWriter, folder_name
from opd.megatron_backend.checkpoint_retention import Retention, complete_steps, prune

pytestmark = pytest.mark.unit


def put(directory: Path, *steps: int) -> None:
    """Whole checkpoints, the last of them the latest."""
    for step in steps:
        writer = DirectoryWriter(directory, step)
        folder = writer.begin()
        for name in ("metadata.json", ".metadata", "common.pt", "__0_0.distcp"):
            (folder / name).write_text("x")
        writer.commit()


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [2, 4, 6, 8, 10]),
        (Retention(newest=2), [8, 10]),
        (Retention(newest=9), [2, 4, 6, 8, 10]),
        (Retention(interval=4), [4, 8, 10]),
        (Retention(newest=2, interval=6), [6, 8, 10]),
    ],
    ids=str,
)
def test_the_newest_and_the_multiples_stay(tmp_path: Path, retention: Retention, kept: list[int]) -> None:
    put(tmp_path, 2, 4, 6, 8, 10)
    gone = prune(tmp_path, retention)
    assert complete_steps(tmp_path) == kept
    assert gone == [step for step in (2, 4, 6, 8, 10) if step not in kept]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*map(folder_name, kept), TRACKER]


def test_what_is_not_a_whole_checkpoint_of_this_run_is_neither_counted_nor_touched(tmp_path: Path) -> None:
    put(tmp_path, 90)  # of an earlier run in the same folder
    put(tmp_path, 2, 4, 6)
    broken = tmp_path / "iter_0000005"
    broken.mkdir()
    (broken / "common.pt").write_text("no index")
    others = ["release", "iter_3", "iter_0000007_backup", "hf", "rollouts"]
    for name in others:
        (tmp_path / name).mkdir()
        for file in ("metadata.json", ".metadata", "common.pt"):
            (tmp_path / name / file).write_text("x")
    (tmp_path / "iter_0000001").symlink_to(tmp_path / "release")
    assert prune(tmp_path, Retention(newest=2)) == [2]
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {*others, "iter_0000001", "iter_0000004", "iter_0000005", "iter_0000006", "iter_0000090", TRACKER}


def test_the_one_that_the_tracker_names_stays(tmp_path: Path) -> None:
    put(tmp_path, 2, 4, 6)
    (tmp_path / TRACKER).write_text("4")  # as after a crash between the last rename and the tracker
    assert prune(tmp_path, Retention(newest=1)) == [2]
    assert complete_steps(tmp_path) == [4, 6]


def test_companions_lose_the_same_steps_and_no_others(tmp_path: Path) -> None:
    critic, average = tmp_path / "critic", tmp_path / "average"
    put(critic, 2, 3, 4, 6, 8)  # 3: the student's could not be saved; 8: is about to be
    put(tmp_path, 2, 4, 6)
    assert prune(tmp_path, Retention(newest=1), companions=[critic, average]) == [2, 4]
    assert complete_steps(tmp_path) == [6] and complete_steps(critic) == [3, 6, 8]


def test_a_folder_that_cannot_be_deleted_costs_a_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    put(tmp_path, 2, 4)

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    prune(tmp_path, Retention(newest=1))
    assert complete_steps(tmp_path) == [2, 4]
    assert "iter_0000002` is no longer needed and could not be deleted" in caplog.text
