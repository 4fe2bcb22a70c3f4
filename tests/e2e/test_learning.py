"""The laptop run learns: what the README promises for 40 steps, over its first 10."""

from __future__ import annotations

import os
import subprocess
from statistics import mean

import pytest

from tests.e2e.runs import ROOT, rows

pytestmark = pytest.mark.e2e


def test_the_student_gets_better_and_nearer_to_its_teacher(tmp_path):
    script = ROOT / "examples" / "on_policy_distillation" / "run-tiny-cpu.sh"
    done = subprocess.run(
        ["bash", str(script), "--num-rollout", "10"],
        env=os.environ | {"OUTPUT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    history = rows(tmp_path)
    accuracy = {row["step"]: row["eval_accuracy"] for row in history if "eval_accuracy" in row}
    assert 0.3 < accuracy[0] < 0.42
    assert accuracy[10] > accuracy[0] + 0.1
    reverse_kl = [row["opd_reverse_kl"] for row in history[1:]]
    assert mean(reverse_kl[-4:]) < 0.85 * mean(reverse_kl[:4])
    assert max(row["logprob_mismatch_max"] for row in history[1:]) < 1e-3  # behaviour against recomputed log-probs
    assert "accuracy" in done.stdout and "reverse KL" in done.stdout
    for name in ("curves.png", "samples/step_00001.jsonl", "checkpoints/latest_checkpointed_iteration.txt"):
        assert (tmp_path / name).is_file()
