"""docs/benchmarks.md says what the result files say, and leaves no benchmark out."""

from __future__ import annotations

import json
import re

import pytest

from tests.metric_table import ROOT

FOLDER = ROOT / "benchmarks"
OVERVIEW = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").partition("\n## ")[0]
TABLE = [[cell.strip() for cell in line.split("|")[1:-1]] for line in OVERVIEW.splitlines() if line.startswith("| ")][
    1:
]


def figures() -> list[tuple[str, str, str]]:
    """(script, name, figure as printed); a row without a script belongs to the one above."""
    found: list[tuple[str, str, str]] = []
    for script, _, name, figure, _ in TABLE:
        found.append((script.strip("`") or found[-1][0], name.strip("`"), figure))
    return found


@pytest.mark.parametrize(("script", "name", "figure"), figures())
def test_a_figure_is_that_of_the_results(script: str, name: str, figure: str) -> None:
    results = json.loads((FOLDER / "results" / script.replace(".py", "_cpu.json")).read_text(encoding="utf-8"))
    ratios = results.get("ratios") or {case["name"]: case["ratio"] for case in results["cases"]}
    decimals = len(figure.partition(".")[2])
    assert figure == f"{ratios[name]:.{decimals}f}"


def test_every_benchmark_has_its_row() -> None:
    scripts = {path.name for path in FOLDER.glob("*.py") if re.search(r"^    python ", path.read_text(), re.MULTILINE)}
    assert {script for script, _, _ in figures()} == scripts
    assert {path.name.replace("_cpu.json", ".py") for path in (FOLDER / "results").glob("*.json")} == scripts
