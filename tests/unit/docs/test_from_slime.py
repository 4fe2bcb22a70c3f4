"""docs/from_slime.md says what the code does: the table, the defaults, and every flag of the two scripts."""

from __future__ import annotations

import re
import subprocess
import sys

from opd.config.flags import build_parser
from opd.config.slime_flags import DEFAULTS, EVAL_DEFAULTS
from opd.config.slime_table import FLAGS
from tests.metric_table import ROOT
from tests.unit.config.test_slime_flags import SCRIPTS

PAGE = (ROOT / "docs" / "from_slime.md").read_text(encoding="utf-8")
PROSE, TABLE = PAGE.split("## Every other flag")
KNOWN = {option for action in build_parser()._actions for option in action.option_strings}


def test_the_table_is_that_of_the_tool() -> None:
    tool = [sys.executable, str(ROOT / "tools" / "slime_flag_table.py")]
    made = subprocess.run(tool, capture_output=True, text=True, timeout=60, check=True).stdout
    assert TABLE[TABLE.index("| slime's flag") :] == made


def test_every_flag_of_the_two_scripts_has_its_row() -> None:
    rows = "\n".join(line for line in PROSE.splitlines() if line.startswith("| `--"))
    for script in SCRIPTS:
        if script.name in ("run-qwen3-8B-opd", "run-qwen3-8B-opd-megatron"):
            flags = {word for word in script.argv if word.startswith("--")}
            assert {flag for flag in flags if f"`{flag}`" not in rows and f"`{flag} " not in rows} == set()


def test_the_pages_flags_exist() -> None:
    outside = {"--address", "--runtime-env-json", "--nproc-per-node"}  # of ray and torchrun
    slimes = {f"--{name}" for name in FLAGS} | {"--rollout-function-path", "--custom-config-path"}
    assert set(re.findall(r"--[a-z][a-z0-9]*(?:-[a-z0-9]+)*", PROSE)) <= KNOWN | outside | slimes | {"--sglang"}


def test_the_defaults_table_is_complete() -> None:
    rows = [line for line in PROSE.splitlines() if line.startswith("| `--") and line.count("|") == 4]
    named = set(re.findall(r"`--([a-z0-9-]+)`", " ".join(row.split("|")[1] for row in rows)))
    assert {name.replace("_", "-") for name in (*DEFAULTS, *EVAL_DEFAULTS)} <= named
    for name, value in DEFAULTS.items():
        row = next(row for row in rows if f"`--{name.replace('_', '-')}`" in row)
        assert ("on" if value is True else str(value)) in row.split("|")[2]
