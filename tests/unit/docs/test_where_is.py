"""Every file and function that docs/where_is.md names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_every_place_exists():
    rows = [line for line in (ROOT / "docs" / "where_is.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    for row in rows[1:]:
        cell = row.split("|")[2]
        folder = None
        for name in re.findall(r"`([^`]+)`", cell):
            if name.endswith((".py", ".sh")):
                path = ROOT / name if "/" in name else folder / name
                assert path.is_file(), f"{name} in: {row}"
                folder, source = path.parent, path.read_text()
            else:
                assert re.search(rf"(def|class) {name}\b", source), f"{name} in: {row}"
