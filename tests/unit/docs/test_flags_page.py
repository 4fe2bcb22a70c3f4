"""docs/flags.md is what the schema says."""

from __future__ import annotations

import subprocess
import sys

from tests.metric_table import ROOT


def test_the_page_is_that_of_the_tool() -> None:
    tool = [sys.executable, str(ROOT / "tools" / "flags_page.py")]
    made = subprocess.run(tool, capture_output=True, text=True, timeout=60, check=True).stdout
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == made, "run python tools/flags_page.py > docs/flags.md"
