"""Saved samples: aligned lists, alternatives as texts, null instead of NaN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opd.report.samples import drop_samples_after, write_samples
from opd.types import Sample, SampleStatus, TopLogprobs


def sample(index: int, response: list[int], **fields: object) -> Sample:
    values = {"rollout_log_probs": [-0.5] * len(response), "reward": 1.0, "status": SampleStatus.COMPLETED}
    return Sample(
        index=index,
        group_index=index // 4,
        prompt="3+4=",
        label="7",
        tokens=[1, 2, 3, *response],
        response="x" * len(response),
        response_length=len(response),
        **(values | fields),
    )


def read(path: Path | None) -> list[dict]:
    assert path is not None
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_per_token_values_line_up_with_the_response(tmp_path: Path) -> None:
    likely = TopLogprobs(ids_TK=torch.tensor([[11, 9], [12, -1]]), logprobs_TK=torch.tensor([[-0.5, -1.23456], [0, 0]]))
    known = {
        "student_log_probs": torch.tensor([-0.5, float("nan")]),
        "teacher_log_probs": torch.tensor([-0.25, -1.0]),
        "penalty": [0.123456789, 0.0],
        "student_top": likely,
    }
    samples = [sample(0, [11]), sample(1, [11, 12])]
    path = write_samples(tmp_path, 7, samples, {1: known}, decode=lambda ids: f"<{ids[0]}>")
    assert path == tmp_path / "step_00007.jsonl"
    assert read(path) == [
        {
            "step": 7,
            "evaluation": False,
            "mixed": False,
            "index": 1,
            "group_index": 0,
            "prompt": "3+4=",
            "label": "7",
            "response": "xx",
            "reward": 1.0,
            "status": "completed",
            "off_policy": False,
            "token_ids": [11, 12],
            "token_texts": ["<11>", "<12>"],
            "rollout_log_probs": [-0.5, -0.5],
            "student_log_probs": [-0.5, None],
            "teacher_log_probs": [-0.25, -1.0],
            "penalty": [0.123457, 0.0],
            "student_entropy": None,
            "teacher_entropy": None,
            "student_top": [[["<11>", -0.5], ["<9>", -1.235]], [["<12>", 0.0]]],
            "teacher_top": None,
        }
    ]


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    samples = [sample(0, [11], rollout_log_probs=None), sample(1, []), sample(2, [11], off_policy=True)]
    path = write_samples(tmp_path, 3, samples, {2: {}, 0: {}, 1: {"penalty": []}}, evaluation=True)
    assert path.name == "eval_00003.jsonl"
    records = read(path)
    assert [record["index"] for record in records] == [0, 1, 2]
    assert [record["rollout_log_probs"] for record in records] == [None, [], None]
    assert [record["penalty"] for record in records] == [None, [], None]
    assert records[0]["teacher_log_probs"] is records[0]["student_log_probs"] is records[0]["token_texts"] is None


def test_nothing_is_written_when_nothing_is_asked_for(tmp_path: Path) -> None:
    assert write_samples(tmp_path / "samples", 1, [sample(0, [11])], {}) is None
    assert not (tmp_path / "samples").exists()


def test_lists_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample 0: 2 penalty for 1 response tokens"):
        write_samples(tmp_path, 1, [sample(0, [11])], {0: {"penalty": [0.0, 0.0]}})
    assert list(tmp_path.iterdir()) == []


def test_a_resume_drops_later_files(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_samples(tmp_path, step, [sample(0, [11])], {0: {}})
    drop_samples_after(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00001.jsonl", "step_00002.jsonl"]
