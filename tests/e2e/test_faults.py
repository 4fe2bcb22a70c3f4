"""Each fault ends in a clear message, and nothing that was learned is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from opd.serving.server import free_port
from tests.e2e.runs import TASK, rows, run, start, tiny_flags

pytestmark = pytest.mark.e2e


def error_line(printed: str) -> str:
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in printed, printed[-3000:]
    return lines[0]


def sglang_flags(folder: Path, port: int, **changes) -> list[str]:
    teacher = {
        "opd_type": "sglang",
        "opd_teacher_load": None,
        "rm_url": f"http://127.0.0.1:{port}/generate",
        "opd_teacher_timeout": 20,
        "opd_teacher_retries": 1,
    }
    return tiny_flags(folder, **teacher | changes)


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
        tiny_flags(folder, num_rollout=3, **saving), log=tmp_path / "full.log", expect=1, file_limit=1_000_000
    )
    assert "step 1 stays the latest" in error_line(printed)
    assert "Training goes on; the next step tries again" in printed  # after step 2; the last save has to succeed
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"

    run(tiny_flags(folder, num_rollout=3, **saving), log=tmp_path / "freed.log")
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "3"


def test_a_teacher_that_dies_during_the_run(tmp_path, teacher_server):
    """The run stops after saving; with the teacher back, it goes on from the step it was at."""
    folder = tmp_path / "run"
    saving = {"save": folder / "checkpoints", "load": folder / "checkpoints", "num_rollout": 30}
    saving |= {"opd_teacher_deadline": 3, "opd_teacher_wait": 1}
    server = teacher_server()
    process = start(sglang_flags(folder, server.port, **saving), log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < 2:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
        server.stop()
        assert process.wait(120) == 1
    finally:
        process.kill()
        process.wait()
    message = error_line((tmp_path / "log").read_text())
    assert "have no teacher score, more than --opd-max-unscored-share=0.5" in message
    done = rows(folder)[-1]["step"]
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == str(done)

    server = teacher_server(server.port)
    run(sglang_flags(folder, server.port, **saving | {"num_rollout": done + 2}), log=tmp_path / "again.log")
    assert [row["step"] for row in rows(folder)] == list(range(1, done + 3))
    assert rows(folder)[-1]["unscored_share"] == 0


def test_a_teacher_with_another_tokenizer(tmp_path, teacher_server):
    other = tmp_path / "other"
    other.mkdir()
    for file in (TASK / "teacher").iterdir():
        text = file.read_bytes()
        if file.name == "tokenizer.json":
            tokenizer = json.loads(text)
            vocabulary = tokenizer["model"]["vocab"]
            first, second = (next(w for w in vocabulary if w.strip() == word) for word in ("buys", "finds"))
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
            text = json.dumps(tokenizer).encode()
        (other / file.name).write_bytes(text)
    server = teacher_server(model=other)
    printed = run(sglang_flags(tmp_path / "run", server.port), log=tmp_path / "log", expect=1)
    assert "tokenizer" in error_line(printed)
