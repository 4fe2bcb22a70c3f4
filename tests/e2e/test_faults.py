"""Each fault ends in a clear message, and nothing that was learned is lost."""

from __future__ import annotations

import json

import pytest

from opd.serving.server import free_port
from tests.e2e.runs import TASK, error_line, rows, run, sglang_flags, tiny_flags

pytestmark = pytest.mark.e2e


def test_a_teacher_that_is_not_there(tmp_path):
    port = free_port()
    printed = run(sglang_flags(tmp_path / "run", port), log=tmp_path / "log", expect=1, timeout=60)
    message = error_line(printed)
    assert "--rm-url" in message and str(port) in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "empty"), ('{"prompt": "a", "label": "1"}\n{"prompt": "b", "lab\n', "row 2")],
    ids=["empty", "malformed"],
)
def test_prompt_files_that_cannot_be_used(tmp_path, content, expected):
    data = tmp_path / "prompts.jsonl"
    data.write_text(content)
    printed = run(tiny_flags(tmp_path / "run", prompt_data=data), log=tmp_path / "log", expect=2, timeout=60)
    message = error_line(printed)
    assert "prompts.jsonl" in message and expected in message


def test_a_prompt_longer_than_the_context_is_skipped_and_counted(tmp_path):
    lines = (TASK / "train.jsonl").read_text().splitlines()[:20]
    long_prompt = json.loads(lines[0])["prompt"] * 40
    lines.insert(3, json.dumps({"prompt": long_prompt, "label": "1"}))
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(lines))
    printed = run(tiny_flags(tmp_path / "run", prompt_data=data, num_rollout=1), log=tmp_path / "log")
    assert "skipped 1 of 21 prompts longer than" in printed
    assert len(rows(tmp_path / "run")) == 1


def test_a_disk_that_fills_up_during_a_save(tmp_path):
    folder = tmp_path / "run"
    saving = {"save": folder / "checkpoints", "load": folder / "checkpoints", "save_interval": 1}
    run(tiny_flags(folder, num_rollout=1, **saving), log=tmp_path / "first.log")

    printed = run(
        tiny_flags(folder, num_rollout=3, async_save=True, **saving),
        log=tmp_path / "full.log",
        expect=1,
        file_limit=1_000_000,
    )
    assert "step 1 stays the latest" in error_line(printed)
    assert "Training goes on; the next step tries again" in printed  # after step 2; the last save has to succeed
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"

    run(tiny_flags(folder, num_rollout=3, **saving), log=tmp_path / "freed.log")
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
