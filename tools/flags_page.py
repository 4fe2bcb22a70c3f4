"""Prints docs/flags.md, made from ``opd.config.schema``.

python tools/flags_page.py > docs/flags.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opd.config.flags import build_parser

HEAD = """# Every flag of train.py

Made from `opd/config/schema_*.py` by `tools/flags_page.py`. Names that slime or Megatron know keep their meaning; what
else slime's scripts say is in [from_slime.md](from_slime.md). A `--config FILE` holds the same names without dashes.
Rules between flags are checked before anything starts, and `--dry-run` shows what a command line comes to.
"""


def page() -> str:
    parts = [HEAD]
    for group in build_parser()._action_groups:
        rows = list(_rows(group))
        if rows:
            about = f"{group.description}\n\n" if group.description else ""
            parts.append(f"## {group.title}\n\n{about}| flag | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _rows(group: argparse._ArgumentGroup) -> Iterator[str]:
    for action in group._group_actions:
        if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        names = " ".join(f"`{name}`" for name in action.option_strings)
        help = (action.help or "").replace("|", "\\|")
        choices = f" ({', '.join(f'`{choice}`' for choice in action.choices)})" if action.choices else ""
        yield f"| {names} | {_default(action.default)} | {help}{choices} |"


def _default(value: object) -> str:
    if value is None or value is False:
        return ""
    return "on" if value is True else f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")
