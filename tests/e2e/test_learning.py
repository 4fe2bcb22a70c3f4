"""The laptop run learns: what the README promises for 40 steps, over its first 10."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

from tests.documented import execute
from tests.e2e.alternatives import check_alternatives
from tests.e2e.runs import TASK, rows

pytestmark = pytest.mark.e2e


def test_the_student_gets_better_and_nearer_to_its_teacher(tmp_path: Path) -> None:
    printed = execute("make demo", tmp_path, more='DEMO_ARGS="--num-rollout 10"')
    output = tmp_path / "outputs" / "tiny-cpu"
    history = rows(output)
    accuracy = {row["step"]: row["eval_accuracy"] for row in history if "eval_accuracy" in row}
    assert 0.3 < accuracy[0] < 0.42
    assert accuracy[10] > accuracy[0] + 0.1
    reverse_kl = [row["opd_reverse_kl"] for row in history[1:]]
    assert mean(reverse_kl[-4:]) < 0.85 * mean(reverse_kl[:4])
    assert max(row["logprob_mismatch_max"] for row in history[1:]) < 1e-3  # behaviour against recomputed log-probs
    assert re.search(
        r"^accuracy 3\d\.\d% -> \d\d\.\d% \(step 10\)\nreverse KL 0\.\d+ -> 0\.\d+ nats", printed, re.MULTILINE
    )
    models = {"student_top": TASK / "student", "teacher_top": TASK / "teacher"}
    check_alternatives(output / "samples" / "eval_00000.jsonl", **models)  # before the training
    for name in (
        "report.html",
        "curves.png",
        "samples/step_00001.jsonl",
        "checkpoints/latest_checkpointed_iteration.txt",
    ):
        assert (output / name).is_file()
