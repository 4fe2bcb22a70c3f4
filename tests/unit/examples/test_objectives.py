"""The comparison of objectives: its controls and data by hand, its script and its panels."""

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
def objectives(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "experiments"))
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


def test_every_panel_names_objectives_of_the_script(objectives):
    known = set(re.findall(r"^      (\w+)\) FLAGS=", SCRIPT.read_text(), flags=re.MULTILINE))
    shown = {name for panel in objectives.PANELS.values() for name in panel} | set(objectives.LONGER)
    assert shown == known


def test_the_script_refuses_an_unknown_objective(tmp_path):
    command = ["bash", str(SCRIPT), "nothing", "42"]
    ended = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert ended.returncode == 2 and "no objective 'nothing'; choose one of opd grpo" in ended.stderr


def test_the_script_skips_a_complete_run(tmp_path):
    """Complete by the number of steps asked for, in its usual folder or one that is named."""
    for name, steps in (("opd-42", 40), ("short", 30)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": steps, "tokens": 1}) + "\n")
    command = ["bash", str(SCRIPT), "opd", "42"]
    usual = {"PATH": "/usr/bin:/bin", "OBJECTIVES_DIR": str(tmp_path)}
    for folder, environ in (("opd-42", {}), ("short", {"STEPS": "30", "OUTPUT_DIR": str(tmp_path / "short")})):
        ended = subprocess.run(command, capture_output=True, text=True, env=usual | environ)
        assert (ended.returncode, ended.stdout) == (0, f"{tmp_path}/{folder}: complete\n")
