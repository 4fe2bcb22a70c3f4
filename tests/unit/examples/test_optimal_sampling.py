"""The sampling examples, on few problems and with the shipped teacher in place of the one that they make."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "optimal_sampling"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example's main with some of its constants changed; returns what it printed."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    import tiny_pair

    monkeypatch.setattr(tiny_pair, "TEACHER", tiny_pair.TASK / "teacher")

    def run_example(name, **constants):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        module.main()
        return capsys.readouterr().out

    return run_example


def test_basic_prints_a_row_per_token(run):
    printed = run("01_basic")
    answer = re.search(r"^mixture +(.+)$", printed, re.MULTILINE).group(1)
    tokens = re.findall(r"^'(.+?)' +[01]\.\d\d ", printed, re.MULTILINE)
    assert "".join(tokens).removesuffix("<eos>") == answer


def test_batch_writes_what_the_trainer_reads(run, tmp_path):
    printed = run("02_batch_with_answers", PROBLEMS=6, ROOT=tmp_path, OUTPUT=tmp_path / "new" / "batch.jsonl")
    right = [float(share) for share in re.findall(r"^(?:student|mixture|teacher) +([\d.]+)%", printed, re.MULTILINE)]
    assert len(right) == 3 and right[0] <= right[2]
    rows = [json.loads(line) for line in (tmp_path / "new" / "batch.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(row["prompt"] and row["response"] for row in rows)


def test_multi_prefix_reports_each_kind(run):
    printed = run("03_multi_prefix", PROBLEMS=4)
    assert len(re.findall(r"% right$", printed, re.MULTILINE)) == 5
    assert 1 <= float(re.search(r"([\d.]+) different answers per problem, of 5", printed).group(1)) <= 5


def test_filter_counts_every_answer_and_keeps_only_right_ones(run):
    printed = run("04_filter", PROBLEMS=8)
    assert sum(int(count) for count in re.findall(r" (\d+)$", printed.split("right before")[0], re.MULTILINE)) == 8
    assert "after 100.0% of" in printed
