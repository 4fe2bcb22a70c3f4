"""docs/reliability.md promises nothing that no test shows: every test, flag and metric on the page exists."""

from __future__ import annotations

import re

import pytest

from opd.config.schema import Config
from tests.metric_table import ROOT, table

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| fault")
]
ROWS = [row for row in ROWS if "tests/" in row[-1]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("| "))
def test_a_row_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 4
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[3])
    assert named
    for path, test in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE), f"{path} has no {test}"


def test_every_fault_has_its_row() -> None:
    text = "\n".join(row[0] for row in ROWS)
    faults = ("restarted", "503 for 20 s", "past the deadline", "truncated JSON", "NaN, -inf", "one entry too few")
    faults += ("wrong ids", "10x slower", "killed while it writes", "during a weight update", "kill -9", "SIGTERM")
    for fault in (*faults, "disk full during a save"):
        assert fault in text


def test_flags_and_metrics_of_the_page_exist() -> None:
    flags = {"--" + name.replace("_", "-") for name in Config().flat()} | {"--prompt-tokens", "--answers"}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= flags
    watched = PAGE[PAGE.index("## What to watch") : PAGE.index("## Before a run")]
    assert set(re.findall(r"`([a-z_0-9]+)`", watched)) - {"opd_last_report_timestamp_seconds"} <= set(table())
