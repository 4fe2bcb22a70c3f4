"""Folders, tracker and interrupted saves; no torch involved."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.megatron_backend.checkpoint_layout import (
    TRACKER,
    CheckpointError,
    DirectoryWriter,
    hf_files,
    iterations,
    latest_iteration,
    resolve,
    write_hf_files,
)

pytestmark = pytest.mark.unit


def put(directory: Path, iteration, content: str = "x") -> Path:
    writer = DirectoryWriter(directory, iteration)
    (writer.begin() / "common.pt").write_text(content)
    return writer.commit()


def test_a_commit_makes_the_checkpoint_the_latest(tmp_path: Path) -> None:
    put(tmp_path, "release")
    put(tmp_path, 5)
    path = put(tmp_path, 10)
    assert path == tmp_path / "iter_0000010"
    assert (tmp_path / TRACKER).read_text() == "10"
    assert latest_iteration(tmp_path) == 10
    assert iterations(tmp_path) == ["release", 5, 10]
    assert resolve(tmp_path) == path
    assert resolve(tmp_path, 5) == tmp_path / "iter_0000005"
    assert resolve(tmp_path, "release") == tmp_path / "release"


def test_an_unfinished_save_is_not_seen_and_goes_with_the_next(tmp_path: Path) -> None:
    put(tmp_path, 5)
    (DirectoryWriter(tmp_path, 10).begin() / "common.pt").write_text("half")
    assert latest_iteration(tmp_path) == 5 and iterations(tmp_path) == [5]
    put(tmp_path, 15)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", "iter_0000015", TRACKER]


def test_an_aborted_save_leaves_nothing(tmp_path: Path) -> None:
    put(tmp_path, 5)
    writer = DirectoryWriter(tmp_path, 10)
    writer.begin()
    writer.abort()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", TRACKER]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    put(tmp_path, 5, "old")
    put(tmp_path, 5, "new")
    assert (resolve(tmp_path) / "common.pt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", TRACKER]


def test_killed_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    """The old checkpoint is aside and the new one has no name yet: the old one is still found, and is put back."""
    put(tmp_path, 5, "old")
    (tmp_path / "iter_0000005").rename(tmp_path / ".previous_iter_0000005")
    assert (resolve(tmp_path) / "common.pt").read_text() == "old"
    put(tmp_path, 6)
    assert (resolve(tmp_path, 5) / "common.pt").read_text() == "old"
    assert iterations(tmp_path) == [5, 6]


def test_killed_before_the_tracker_is_written(tmp_path: Path) -> None:
    put(tmp_path, 5)
    put(tmp_path, 10)
    (tmp_path / TRACKER).write_text("5")
    assert resolve(tmp_path).name == "iter_0000005"
    put(tmp_path, 10, "again")
    assert (resolve(tmp_path) / "common.pt").read_text() == "again"


def test_errors_name_the_folder_and_the_steps_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"`{tmp_path}/none` does not exist"):
        resolve(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no checkpoint: it has no latest_checkpointed_iteration.txt"):
        resolve(tmp_path)
    put(tmp_path, "release")
    put(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 \(steps there: release, 5\)"):
        resolve(tmp_path, 7)
    (tmp_path / TRACKER).write_text("five")
    with pytest.raises(CheckpointError, match="holds `five`: expected an iteration number or `release`"):
        latest_iteration(tmp_path)


def test_one_iterations_folder_is_itself_a_checkpoint(tmp_path: Path) -> None:
    path = put(tmp_path, 5)
    (path / "metadata.json").write_text("{}")
    assert resolve(path) == path


def test_config_and_tokenizer_travel_and_weights_do_not(tmp_path: Path) -> None:
    source, checkpoint = tmp_path / "hf_source", tmp_path / "checkpoint"
    source.mkdir()
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in [*names, "special_tokens_map.json", "merges.txt", "model.safetensors", "notes.md"]:
        (source / name).write_text(name)
    assert hf_files(checkpoint) is None
    folder = write_hf_files(source, checkpoint)
    assert {p.name for p in folder.iterdir()} == {*names, "special_tokens_map.json", "merges.txt"}
    assert hf_files(checkpoint) == hf_files(checkpoint / "iter_0000005") == folder
    assert write_hf_files(folder, checkpoint) == folder  # a resumed run passes the checkpoint's own files
    assert (folder / "merges.txt").read_text() == "merges.txt"
