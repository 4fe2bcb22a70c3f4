"""Saved samples: aligned lists, spread over the prompts, null instead of NaN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opd.report.samples import drop_samples_after, write_samples
from opd.types import Sample, SampleStatus


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
    one = sample(0, [11, 12], teacher_log_probs=torch.tensor([-0.25, -1.0]))
    path = write_samples(
        tmp_path,
        7,
        [one],
        limit=4,
        student_log_probs=[torch.tensor([-0.5, float("nan")])],
        penalties=[[0.123456789, 0.0]],
        decode=lambda ids: f"<{ids[0]}>",
    )
    assert path == tmp_path / "step_00007.jsonl"
    assert read(path) == [
        {
            "step": 7,
            "evaluation": False,
            "mixed": False,
            "index": 0,
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
        }
    ]


def test_samples_are_spread_over_the_prompts(tmp_path: Path) -> None:
    samples = [sample(i, [11]) for i in range(16)]
    records = read(write_samples(tmp_path, 1, samples, limit=4, penalties=[[float(i)] for i in range(16)]))
    assert [record["index"] for record in records] == [0, 4, 8, 12]
    assert [record["group_index"] for record in records] == [0, 1, 2, 3]
    assert [record["penalty"] for record in records] == [[0.0], [4.0], [8.0], [12.0]]


def test_samples_without_scores_have_null_lists(tmp_path: Path) -> None:
    samples = [sample(0, [11], rollout_log_probs=None), sample(1, [])]
    records = read(write_samples(tmp_path, 1, samples, limit=2, student_log_probs=[None, []]))
    assert [record["rollout_log_probs"] for record in records] == [None, []]
    assert records[0]["teacher_log_probs"] is records[0]["student_log_probs"] is records[0]["token_texts"] is None


def test_only_answers_whose_values_are_known_here_are_chosen(tmp_path: Path) -> None:
    samples = [sample(i, [11]) for i in range(8)]
    student = [[-0.5] if i % 2 else None for i in range(8)]  # the others are of another rank's share
    path = write_samples(tmp_path, 3, samples, limit=2, evaluation=True, student_log_probs=student)
    assert path.name == "eval_00003.jsonl"
    assert [record["index"] for record in read(path)] == [1, 5]


def test_nothing_is_written_when_nothing_is_asked_for(tmp_path: Path) -> None:
    assert write_samples(tmp_path / "samples", 1, [sample(0, [11])], limit=0) is None
    assert write_samples(tmp_path / "samples", 1, [], limit=8) is None
    assert not (tmp_path / "samples").exists()


def test_lists_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="per-sample values for 1 samples, but there are 2"):
        write_samples(tmp_path, 1, [sample(0, [11]), sample(1, [11])], limit=2, penalties=[[0.0]])
    with pytest.raises(ValueError, match="sample 0: 2 penalty for 1 response tokens"):
        write_samples(tmp_path, 1, [sample(0, [11])], limit=2, penalties=[[0.0, 0.0]])
    assert list(tmp_path.iterdir()) == []


def test_a_resume_drops_later_files(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_samples(tmp_path, step, [sample(0, [11])], limit=1)
    drop_samples_after(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00001.jsonl", "step_00002.jsonl"]
