"""The comparison of objectives: its controls and data by hand, and what is read from finished runs."""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
from pathlib import Path

import pytest
import torch

from opd.config.paths import load_function
from opd.data.batching import make_batch
from opd.data.tokenizer import load_tokenizer
from opd.types import Sample, SampleStatus

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples" / "on_policy_distillation" / "tiny_task"
SCRIPT = FOLDER.parent / "compare-objectives.sh"
MODULES = "examples.on_policy_distillation.tiny_task"


@pytest.fixture
def tiny_task(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def objectives(tiny_task):
    import objectives

    return objectives


@pytest.fixture
def batch():
    """One answer of four tokens of probability 0.999, 0.6, 0.4 and 0.001, with an advantage of 1 each."""
    sample = Sample(
        index=0,
        group_index=0,
        prompt="p",
        tokens=[1, 2, 3, 4, 5],
        response_length=4,
        rollout_log_probs=[0.0] * 4,
        status=SampleStatus.COMPLETED,
        reward=1.0,
    )
    made = make_batch([sample], torch.zeros(1, dtype=torch.float64), samples_per_step=1)
    return made.with_(student_logprobs_T=torch.tensor([0.999, 0.6, 0.4, 0.001]).log(), advantages_T=torch.ones(4))


@pytest.mark.parametrize(
    ("name", "advantages"),
    [
        ("alone", [0.0, 0.0, -4.0, -4.0]),
        ("alone_wide", [0.0, -4.0, -4.0, -4.0]),
        ("beside_the_reward", [1.0, 1.0, -3.0, -3.0]),
        ("faint_beside_the_reward", [1.0, 1.0, 0.6, 0.6]),
    ],
)
def test_the_null_teacher_knows_only_the_students_own_probability(batch, name, advantages):
    function = load_function(f"{MODULES}.null_teacher.{name}", flag="--custom-advantage-function-path")
    assert function(argparse.Namespace(), batch).tolist() == pytest.approx(advantages)
    scored = batch.with_(teacher_logprobs_T=torch.full((4,), -9.0))
    assert function(argparse.Namespace(), scored).tolist() == pytest.approx(advantages)


def test_the_reward_is_reported_and_trains_nothing():
    function = load_function(f"{MODULES}.measure_only.measure_only", flag="--custom-reward-post-process-path")
    samples = [Sample(index=i, group_index=0, prompt="p", reward=float(i)) for i in range(2)]
    assert function(argparse.Namespace(), samples) == ([0.0, 1.0], [0.0, 0.0])


def test_the_warm_up_is_right_behind_an_answer_and_sloppy_without(tiny_task):
    from make_privileged import warmup_rows
    from problems import distinct_problems

    held_out = distinct_problems(256, seed=999)
    rows = warmup_rows(600, random.Random(0), held_out)
    tokenizer = load_tokenizer(FOLDER / "student")
    right = {True: [], False: []}
    for row in rows:
        label, problem = re.fullmatch(r"(?:Answer: (\d+)\. )?(.*)", row["prompt"]).groups()
        assert problem not in {p.prompt for p in held_out}
        assert tokenizer.decode(tokenizer(row["prompt"])["input_ids"]) == row["prompt"]
        right[label is not None].append(row["response"].endswith(f"# {label}") if label else True)
    hinted = len(right[True])
    assert all(right[True]) and 240 < hinted < 360


def test_a_misled_teacher_sees_another_number(tiny_task):
    from make_privileged import behind, right_number, wrong_number
    from problems import distinct_problems

    rng = random.Random(0)
    for problem in distinct_problems(50, seed=1):
        assert right_number(problem, rng) == problem.answer != wrong_number(problem, rng)
        assert behind(7, problem) == f"Answer: 7. {problem.prompt}"


def test_the_template_is_the_one_of_the_script(tiny_task):
    from make_privileged import TEMPLATE

    assert f'--opd-teacher-prompt-template "{TEMPLATE}"' in SCRIPT.read_text()


def test_problems_with_a_product_go_to_times(tiny_task):
    from make_routes import route

    assert route({"prompt": "Tom has 1 eggs, gets 2 bags of 3, loses 1, loses 1. How many?"}) == "times"
    assert route({"prompt": "Tom has 9 eggs, gives 2 away, loses 1, loses 1. How many?"}) == "plus"


def write_run(folder: Path, name: str, accuracies: dict[int, float], *, steps: int = 40) -> None:
    rows = [{"step": 0, "eval_accuracy": accuracies[0]}] if 0 in accuracies else []
    for step in range(1, steps + 1):
        row = {"step": step, "reward_mean": step / 100, "opd_reverse_kl": 1 / step}
        rows.append(row | ({"eval_accuracy": accuracies[step]} if step in accuracies else {}))
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path, "opd-42", {0: 0.4, 10: 0.5, 20: 0.6, 30: 0.8, 40: 0.9})
    write_run(tmp_path, "opd-43", {0: 0.4, 10: 0.6, 20: 0.7, 30: 0.75, 40: 0.78})
    write_run(tmp_path, "grpo-42", {0: 0.4, 10: 0.4, 20: 0.4, 30: 0.4, 40: 0.5})
    write_run(tmp_path, "jsd-42", {0: 0.4, 10: 0.5}, steps=12)  # was stopped
    write_run(tmp_path, "something-else-1", {0: 0.4, 10: 0.5, 20: 0.6, 30: 0.8, 40: 0.9})
    return tmp_path


def test_only_known_and_finished_runs_count(objectives, runs):
    assert [(run.name, run.seed) for run in objectives.finished_runs(runs)] == [("opd", 42), ("opd", 43), ("grpo", 42)]


def test_table_by_hand(objectives, runs):
    """OPD reaches 70% at steps 25 and 20; 80% at 30 with one seed alone. KL 1/step: (1 + 1/2 + ... + 1/5) / 5."""
    lines = objectives.table(objectives.finished_runs(runs)).splitlines()
    assert lines[2] == (
        "| OPD penalty | 42, 43 | 55.0 | 65.0 | 77.5 | 84.0 (90.0, 78.0) | 22 | 30, above 40 | 38 | 0.457 -> 0.026 |"
    )
    assert lines[3] == (
        "| GRPO, reward only | 42 | 40.0 | 40.0 | 40.0 | 50.0 | above 40 | above 40 | 38 | 0.457 -> 0.026 |"
    )
    assert len(lines) == 4


@pytest.mark.parametrize(("level", "step"), [(40, 0), (45, 5), (50, 10), (65, 20), (81, None)])
def test_steps_to_a_level(objectives, level, step):
    """On straight lines between evaluations; a level that is left again counts from its first time."""
    assert objectives.steps_to({0: 40.0, 10: 50.0, 20: 65.0, 30: 60.0, 40: 80.0}, level) == step


def test_smoothing_keeps_a_straight_line(objectives):
    assert objectives.smoothed({step: 2.0 * step for step in range(1, 8)})[4] == 8.0


def test_labels_are_spread_around_the_ends_of_their_lines(objectives):
    """0.50 and 0.52 move apart by as much; 0.97 and 0.99 stop at the top; 0.1 stays."""
    places = objectives.spread([0.1, 0.50, 0.52, 0.97, 0.99], apart=0.06, top=0.98)
    assert places == pytest.approx([0.1, 0.48, 0.54, 0.92, 0.98])


def test_both_pictures_are_drawn(objectives, runs):
    found = objectives.finished_runs(runs)
    for draw in (objectives.draw_accuracy, objectives.draw_reverse_kl):
        draw(found, runs / "picture.png")
        data = (runs / "picture.png").read_bytes()
        assert data.startswith(b"\x89PNG") and 10_000 < len(data) < 200_000
        (runs / "picture.png").unlink()


def test_every_panel_names_objectives_of_the_script(objectives):
    known = set(re.findall(r"^      (\w+)\) FLAGS=", SCRIPT.read_text(), flags=re.MULTILINE))
    shown = {name for panel in objectives.PANELS.values() for name in panel} | set(objectives.LONGER)
    assert shown == known


def test_the_script_refuses_an_unknown_objective(tmp_path):
    command = ["bash", str(SCRIPT), "nothing", "42"]
    ended = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert ended.returncode == 2 and "no objective 'nothing'; choose one of opd grpo" in ended.stderr


def test_the_script_skips_a_complete_run(runs):
    command = ["bash", str(SCRIPT), "opd", "42"]
    environ = {"PATH": "/usr/bin:/bin", "OBJECTIVES_DIR": str(runs)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert (ended.returncode, ended.stdout) == (0, f"{runs}/opd-42: complete\n")
