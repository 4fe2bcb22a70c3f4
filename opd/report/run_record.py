"""OUTPUT_DIR/run.json: the flags that a run was given and the versions it ran on, for whoever looks at it later."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from opd.report.whole_file import write_whole

FILE_NAME = "run.json"
PACKAGES = ("opd", "torch", "megatron-core", "sglang", "transformers", "mbridge", "ray")
CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+@")  # of http://user:password@host


def write_run_record(folder: Path, flags: Mapping[str, Any]) -> None:
    """
    Args:
        flags: those that are not at their default, by field name.

    Raises:
        OSError: it cannot be written.
    """
    record = {
        "flags": {name: _shown(value) for name, value in flags.items()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }
    text = json.dumps(record, indent=1) + "\n"
    write_whole(folder / FILE_NAME, lambda file: file.write_text(text, encoding="utf-8"))


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return CREDENTIALS.sub("", value) if isinstance(value, str) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
