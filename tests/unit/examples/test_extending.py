"""The examples of functions of one's own: short, shown as they are in docs/extending.md, and right."""

from __future__ import annotations

import ast
import asyncio
import io
import math
import re
import tokenize
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

from examples.extending.divergence import forward_kl_where_unsure, hellinger, reverse_kl
from examples.extending.reward import COST, right_and_short
from opd.maths.divergence_custom import check_function
from opd.types import Sample, SampleStatus

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "examples" / "extending").glob("*.py"))
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(source: str) -> int:
    """Without blank lines, comments and docstrings."""
    strings = [
        node.body[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node)
    ]
    documented = {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in LAYOUT for line in range(t.start[0], t.end[0] + 1)}
    return len(code - documented)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_is_under_30_lines_of_code(path: Path) -> None:
    assert len(FILES) == 3
    assert 5 < lines_of_code(path.read_text()) < 30


def test_the_page_shows_them_as_they_are() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    sources = [path.read_text() for path in FILES]
    assert [sum(block in source for source in sources) for block in shown] == [1, 1, 1, 0]
    assert "batch.advantages_T" in shown[3]  # the advantage has no file of its own


@pytest.mark.parametrize(
    ("response", "status", "reward"),
    [
        ("15+18=33; # 33", SampleStatus.COMPLETED, 1 - 4 * COST),
        ("15+18=33; # 133", SampleStatus.COMPLETED, -4 * COST),
        ("15+18=33; # 33", SampleStatus.TRUNCATED, 0.0),
        ("", SampleStatus.COMPLETED, -4 * COST),
    ],
)
def test_the_reward(response: str, status: SampleStatus, reward: float) -> None:
    sample = Sample(index=0, group_index=0, prompt="", response=response, response_length=4, label="33", status=status)
    assert asyncio.run(right_and_short(Namespace(), sample)) == pytest.approx(reward)


def test_the_objectives() -> None:
    student, teacher = (
        torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]]),
        torch.tensor([[0.98, 0.01, 0.01], [1 / 3] * 3]),
    )
    both = Namespace(), student.log(), teacher.log()
    backward, forward = (student * (student / teacher).log()).sum(-1), (teacher * (teacher / student).log()).sum(-1)
    torch.testing.assert_close(reverse_kl(*both).sum(-1), backward)
    torch.testing.assert_close(hellinger(*both).sum(-1), 1 - (student * teacher).sqrt().sum(-1))
    unsure = torch.tensor([False, math.log(3) > 1.0])
    torch.testing.assert_close(forward_kl_where_unsure(*both), torch.where(unsure, forward, backward))


@pytest.mark.parametrize(
    ("function", "by_columns"), [(reverse_kl, True), (hellinger, True), (forward_kl_where_unsure, False)]
)
def test_the_objectives_can_be_used(function, by_columns: bool) -> None:
    check_function(partial(function, Namespace()), by_columns=by_columns)
