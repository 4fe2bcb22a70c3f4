"""Every command of README.md and docs/quick_start.md is run, some of them shortened.

What stays out: the set-up that `make demo` and `make test` begin with, for which `.ci/run` makes an environment from
nothing, and the other tests of `make test`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documented import ROOT, command, commands, execute
from tests.e2e.runs import TASK, rows

pytestmark = pytest.mark.e2e

# How a command begins, and the file with the test that runs it.
RUN_BY = {
    "make demo": "tests/e2e/test_learning.py",
    "make test": "tests/e2e/test_documented_commands.py",
    "PATH=": "tests/e2e/test_documented_commands.py",
    ".venv/bin/python examples/walkthrough.py": "tests/unit/examples/test_walkthrough.py",
    ".venv/bin/python examples/minimal_opd.py": "tests/e2e/test_documented_commands.py",
    ".venv/bin/python train.py": "tests/e2e/test_documented_commands.py",
}


def test_every_command_of_the_pages_is_run() -> None:
    assert sorted(map(command, RUN_BY)) == sorted(commands())
    for beginning, file in RUN_BY.items():
        assert f'execute("{beginning}", tmp_path' in (ROOT / file).read_text(encoding="utf-8"), beginning


def test_make_test(tmp_path: Path) -> None:
    """One file of the suite in one process; `.ci/run` has the command without arguments."""
    shorter = "TEST_WORKERS=0 PYTEST_ARGS='-p no:cacheprovider tests/unit/docs/test_where_is.py'"
    printed = execute("make test", tmp_path, more=shorter)
    assert re.search(r"^=+ 1 passed", printed, re.MULTILINE)
    assert {"make setup", "make test"} <= set((ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines())


def test_the_sglang_run(tmp_path: Path) -> None:
    """One step of 2 x 2 answers, evaluated on as many problems, in place of 40 of 16 x 8."""
    problems = (TASK / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(problems[:4]), encoding="utf-8")
    shorter = "--num-rollout 1 --rollout-batch-size 2 --n-samples-per-prompt 2 --eval-prompt-data heldout few.jsonl"
    printed = execute("PATH=", tmp_path, more=shorter)
    assert "step 1/1  reward" in printed
    first, last = rows(tmp_path / "outputs" / "tiny-cpu-sglang")
    assert 0 < last["opd_kl_k3"] < 1 and last["unscored_share"] == 0 and last["logprob_mismatch_max"] < 1e-3
    assert 0 <= first["eval_accuracy"] <= 1


def test_the_algorithm_on_one_page(tmp_path: Path) -> None:
    """One step in place of 20."""
    printed = execute(".venv/bin/python examples/minimal_opd.py", tmp_path, more="1")
    assert re.search(r"accuracy 3\d\.\d%\nstep 1  reward 0\.\d+  reverse KL 0\.[3-6]\d+\naccuracy", printed)


def test_flags_of_ones_own(tmp_path: Path) -> None:
    """The plan, which leaves nothing behind; then without `--dry-run`, as the page says that it runs."""
    plan = execute(".venv/bin/python train.py", tmp_path)
    assert "Memory of the heaviest training rank" in plan and not (tmp_path / "outputs").exists()
    execute(".venv/bin/python train.py", tmp_path, without="--dry-run")
    assert [row["step"] for row in rows(tmp_path / "outputs" / "mine")] == [1, 2]
