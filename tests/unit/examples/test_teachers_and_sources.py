"""The experiments on teachers and on sources of data: what they learn from, and what is read from them, by hand."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from opd.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples" / "experiments"
TASK = ROOT / "examples" / "on_policy_distillation" / "tiny_task"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(TASK))
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def make_context(modules):
    import make_context

    return make_context


@pytest.fixture
def data_sources(modules):
    import data_sources

    return data_sources


def test_right_and_wrong_contexts_of_the_tasks_own_problems(make_context):
    """Both have as many steps; the right one is the problem's chain, the wrong one ends with another number."""
    shipped = [json.loads(line) for line in (TASK / "train.jsonl").read_text().splitlines()[:300]]
    held_out = {json.loads(line)["prompt"] for line in (TASK / "eval.jsonl").read_text().splitlines()}
    rng = random.Random(0)
    problems = make_context.distinct_problems(300, seed=make_context.TRAIN_SEED, exclude=frozenset(held_out))
    tokenizer = load_tokenizer(TASK / "student")
    for problem, row in zip(problems, shipped, strict=True):
        made = make_context.row_with_contexts(problem, rng)
        assert row == {"prompt": made["prompt"], "label": made["label"]}
        assert made["right"] == f"Answer: {problem.chain()}."
        assert made["wrong"].count("; ") == made["right"].count("; ")
        assert not made["wrong"].endswith(f"# {row['label']}.")
        for text in (f"{made['right']} {row['prompt']}", f"{made['wrong']} {row['prompt']}"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_warm_up_follows_its_context_right_or_wrong(make_context):
    excluded = frozenset(p.prompt for p in make_context.distinct_problems(256, seed=make_context.HELD_OUT_SEED))
    rows = make_context.warmup_rows(600, random.Random(0), excluded)
    behind = [row for row in rows if row["prompt"].startswith("Answer")]
    for row in behind:
        shown, problem = re.fullmatch(r"(Answer: .+ # \d+\.) (.*)", row["prompt"]).groups()
        assert shown == make_context.context(row["response"])
        assert problem not in excluded
    slips = sum(not _is_right(row["response"]) for row in behind)
    assert 240 < len(behind) < 360
    assert 0.6 < slips / len(behind) < 0.9  # most have one that no rule foretells: the context must be read


def _is_right(chain: str) -> bool:
    """Whether every step is."""
    return all(eval(left) == int(right) for left, right in re.findall(r"([\d+*-]+)=(\d+)", chain))


def test_a_teacher_of_another_width(modules):
    """Width 64: embedding 52 x 64; three layers of four 64 x 64 and three 64 x 176 matrices, two norms of 64 and two of
    a head's 32; a last norm."""
    from tiny_model import new_model

    model = new_model(load_tokenizer(TASK / "student"), seed=0, width=64)
    assert sum(p.numel() for p in model.parameters()) == 3_328 + 3 * (16_384 + 33_792 + 128 + 64) + 64


def test_a_width_without_whole_heads_is_refused(modules, monkeypatch, capsys):
    import make_teacher

    monkeypatch.setattr("sys.argv", ["make_teacher.py", "--width", "100", "--output-dir", "t"])
    with pytest.raises(SystemExit):
        make_teacher.main()
    assert "--width=100 must be a multiple of 32" in capsys.readouterr().err


def test_an_unknown_condition_is_refused_before_a_teacher_is_made(tmp_path):
    environ = {"PATH": os.environ["PATH"], "CONDITIONS": "smaller", "EXPERIMENTS": str(tmp_path)}
    ended = subprocess.run(["bash", str(FOLDER / "teachers.sh")], capture_output=True, text=True, env=environ)
    assert ended.returncode == 2 and "no condition 'smaller'; choose from same_size" in ended.stderr
    assert not list(tmp_path.iterdir())


def write_round(folder: Path, accuracies: tuple[float, float], rows: list[int]) -> None:
    (folder / "run").mkdir(parents=True)
    (folder / "student").mkdir()
    (folder / "student" / "config.json").write_text("{}")
    metrics = [{"step": 0, "eval_accuracy": accuracies[0]}, {"step": 40, "eval_accuracy": accuracies[1]}]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "answers.jsonl").write_text("".join(json.dumps({"row": row}) + "\n" for row in rows))


def test_table_of_sources_by_hand(data_sources, tmp_path):
    """Seed 44 has one round only and is left out; row 1 was answered rightly twice."""
    for seed, after in ((42, (0.5, 0.75)), (43, (0.625, 0.875))):
        write_round(tmp_path / f"teacher-right-{seed}", (0.25, after[0]), [1, 1, 2])
        write_round(tmp_path / f"teacher-right-{seed}" / "round2", after, [1, 2, 3, 3, seed])
    write_round(tmp_path / "teacher-right-44", (0.25, 0.9), [1])
    found = {"teacher": data_sources.complete_rounds(tmp_path, "teacher")}
    assert data_sources.table(found).splitlines()[2:] == [
        "| teacher | 25.0 | 3 | 2 | 56.2 (50.0, 62.5) | 5 | 4 | 81.2 (75.0, 87.5) |"
    ]
    assert data_sources.as_run("teacher", found["teacher"][0]).accuracy == {0: 25.0, 40: 50.0, 80: 75.0}


def test_the_sources_are_those_of_the_script(data_sources):
    script = (ROOT / "examples" / "optimal_sampling" / "06_compare_sources.sh").read_text()
    assert re.search(r"ENGINES:-([a-z ]+)", script).group(1).split() == list(data_sources.SOURCES)


def test_a_longer_run_is_cut_to_be_compared(modules):
    """80% came after the last step that counts."""
    from results import Run, cut, table

    run = Run(name="r", seed=1, accuracy={0: 40.0, 30: 70.0, 40: 90.0}, reward={}, reverse_kl={}, operations={})
    assert "| 40: 90.0 | 30 | 35 |" in table({"r": [cut(run, None)]})
    assert "| 30: 70.0 | 30 | above 30 |" in table({"r": [cut(run, 30)]})
