"""Each tool and each example without flags says what it is for, at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HELPERS = {"arguments.py", "conversion.py", "flags_page.py", "slime_flag_table.py"}  # parts of tools, or print a page
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if path.name not in HELPERS)
EXAMPLES = sorted((ROOT / "examples" / "optimal_sampling").glob("0*.py"))
ENGINES = {"torch", "transformers", "megatron", "sglang", "ray"}
NEEDS_TORCH = "generate_mixture_data.py"  # its choices stand beside the code that they choose


@pytest.mark.parametrize("script", [*TOOLS, *EXAMPLES], ids=lambda path: path.name)
def test_help_is_the_scripts_own_text_and_loads_no_engine(script: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"finally:\n    print(sorted({ENGINES} & set(sys.modules)), file=sys.stderr)"
    )
    start = [
        sys.executable,
        "-c",
        "import sys; sys.argv[:] = sys.argv[1:]; sys.path.insert(0, sys.argv.pop(0));\n" + code,
    ]
    argv = [*start, str(script.parent), str(script), "--help"]
    environ = {**os.environ, "COLUMNS": "120"}
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environ)
    assert (ended.returncode, ended.stderr) == (0, "['torch']\n" if script.name == NEEDS_TORCH else "[]\n")
    first_line = script.read_text(encoding="utf-8").splitlines()[0].removeprefix('"""')
    assert first_line in ended.stdout


@pytest.mark.parametrize("tool", ["compare_logits", "convert_hf_to_torch_dist", "convert_torch_dist_to_hf"])
def test_a_wrong_flag_is_one_line(tool: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: the following arguments are required: --")
    assert ended.stderr.endswith(f". `{tool}.py --help` lists every flag.\n")
