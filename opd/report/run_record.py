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
# What a reader of the flags should not learn: user:password of an address, and the value of a key in further flags.
_SECRETS = ((re.compile(r"(?<=//)[^/\s]+@"), ""), (re.compile(r"(--[\w-]*(?:key|token|password)[=\s]+)\S+"), r"\1***"))


def write_run_record(folder: Path, flags: Mapping[str, Any]) -> None:
    """
    Args:
        flags: those that are not at their default, by field name.

    Raises:
        OSError: it cannot be written.
    """
    record = {
        "flags": without_secrets(flags),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }
    text = json.dumps(record, indent=1) + "\n"
    write_whole(folder / FILE_NAME, lambda file: file.write_text(text, encoding="utf-8"))


def without_secrets(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags as they may be kept and sent."""
    return {name: _shown(value) for name, value in flags.items()}


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [_shown(item) for item in value]
    for secret, instead in _SECRETS if isinstance(value, str) else ():
        value = secret.sub(instead, value)
    return value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
