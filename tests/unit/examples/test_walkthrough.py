"""The walk-through's numbers are right: sampled KL equals the exact one, and a step follows the signal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documented import execute

pytestmark = pytest.mark.unit


def test_sampled_kl_is_the_exact_one_and_the_penalised_token_gets_less_likely(tmp_path: Path) -> None:
    printed = execute(".venv/bin/python examples/walkthrough.py", tmp_path)
    sampled, exact = map(float, re.search(r"20,000 draws give (\S+), exactly\s(\S+)", printed).groups())
    assert exact > 1 and sampled == pytest.approx(exact, rel=0.05)
    last_table = printed.partition("4. The loss")[2]
    before, after = map(float, re.search(r"│ '.+' +│ -\d\.\d+ +│ (\S+) +│ (\S+) +│", last_table).groups())
    assert after < before
