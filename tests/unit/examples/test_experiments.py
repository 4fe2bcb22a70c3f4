"""What is read from the runs of an experiment, by hand: tables, best learning rates, pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples" / "experiments"


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import results

    return results


@pytest.fixture
def pictures(results):
    import pictures

    return pictures


def write_run(folder: Path, name: str, accuracies: dict[int, float], **flags: object) -> None:
    """40 steps: reward step/100, reverse KL 1/step, 3e12 operations, 1e12 of them the teacher's."""
    rows = [{"step": 0, "eval_accuracy": accuracies[0]}]
    for step in range(1, 41):
        row = {"step": step, "reward_mean": step / 100, "opd_reverse_kl": 1 / step}
        row |= {"flops/update": 2e12, "flops/teacher": 1e12}
        rows.append(row | ({"eval_accuracy": accuracies[step]} if step in accuracies else {}))
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / name / "run.json").write_text(json.dumps({"flags": flags}))


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path, "opd-42", {0: 0.4, 10: 0.5, 20: 0.6, 30: 0.8, 40: 0.9}, opd_kl_coef=1.0)
    write_run(tmp_path, "opd-43", {0: 0.4, 10: 0.6, 20: 0.7, 30: 0.75, 40: 0.85}, opd_kl_coef=1.0)
    write_run(tmp_path, "opd-44", {0: 0.4, 10: 0.5, 20: 0.6, 30: 0.65, 40: 0.78}, opd_kl_coef=1.0)
    write_run(tmp_path, "grpo-42", {0: 0.4, 10: 0.4, 20: 0.4, 30: 0.4, 40: 0.8}, opd_kl_coef=0.0)
    write_run(tmp_path, "no-seed", {0: 0.4})
    return tmp_path


def test_table_by_hand(results, folder):
    """70% at steps 25, 20 and 33.8; 80% at 30, 35 and never: the middle one counts. A step costs 3 TFLOP, and 2 where
    the teacher only measures. KL 1/step: (1 + 1/2 + ... + 1/5) / 5."""
    runs = results.runs_in(folder)
    groups = {"penalty": [run for run in runs if run.name == "opd"], "reward": [r for r in runs if r.name == "grpo"]}
    lines = results.table(groups, baseline="reward").splitlines()
    assert lines[2] == (
        "| penalty | 50.0 | 60.0 | 75.0 | 40: 85.0 (90.0, 85.0, 78.0) | 25 (25, 20, 34) | 35 (30, 35, above 40) "
        "| 105.00 | 38 | 0.457 → 0.026 | 0.8 |"
    )
    assert lines[3] == "| reward | 40.0 | 40.0 | 40.0 | 40: 80.0 | 38 | 40 | 80.00 | 38 | 0.457 → 0.026 | 1.0 |"
    assert len(lines) == 4


@pytest.mark.parametrize(("level", "step"), [(40, 0), (45, 5), (50, 10), (65, 20), (81, float("inf"))])
def test_steps_to_a_level(results, level, step):
    """On straight lines between evaluations; a level that is left again counts from its first time."""
    assert results.steps_to({0: 40.0, 10: 50.0, 20: 65.0, 30: 60.0, 40: 80.0}, level) == step


def test_smoothing_keeps_a_straight_line(results):
    assert results.smoothed({step: 2.0 * step for step in range(1, 8)})[4] == 8.0


def test_labels_are_spread_around_the_ends_of_their_lines(pictures):
    """0.50 and 0.52 move apart by as much; 0.97 and 0.99 stop at the top; 0.1 stays."""
    places = pictures.spread([0.1, 0.50, 0.52, 0.97, 0.99], apart=0.06, top=0.98)
    assert places == pytest.approx([0.1, 0.48, 0.54, 0.92, 0.98])


@pytest.mark.parametrize("panels", [1, 4])
def test_pictures_are_drawn(results, pictures, folder, panels):
    groups = {"penalty": [run for run in results.runs_in(folder) if run.name == "opd"]}
    for draw in (pictures.draw_accuracy, pictures.draw_reverse_kl):
        draw({str(i): groups for i in range(panels)}, folder / "new" / "picture.png")
        data = (folder / "new" / "picture.png").read_bytes()
        assert data.startswith(b"\x89PNG") and 10_000 < len(data) < 200_000
        (folder / "new" / "picture.png").unlink()


def test_an_unknown_name_is_refused(folder):
    command = [sys.executable, str(FOLDER / "results.py"), str(folder), "--names", "opd", "jsd"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and f"no run NAME-SEED with an evaluation in {folder} for jsd" in ended.stderr


def test_the_best_rate_gets_there_first(tmp_path):
    """And where no rate gets to 80%, the one that comes nearest."""
    write_run(tmp_path, "opd@1e-4-41", {0: 0.4, 10: 0.5, 40: 0.99})
    write_run(tmp_path, "opd@1e-3-41", {0: 0.4, 10: 0.8, 40: 0.8})
    write_run(tmp_path, "grpo@1e-4-41", {0: 0.4, 40: 0.6})
    write_run(tmp_path, "grpo@1e-3-41", {0: 0.4, 40: 0.5})
    command = [sys.executable, str(FOLDER / "best_rates.py"), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines() == [
        "grpo 1e-4  # 1e-4: above 40 steps, at most 60.0%; 1e-3: above 40 steps, at most 50.0%",
        "opd 1e-3  # 1e-4: 28 steps, at most 99.0%; 1e-3: 10 steps, at most 80.0%",
    ]
