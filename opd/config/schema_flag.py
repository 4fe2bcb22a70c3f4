"""How a flag of the schema is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def flag(default: Any, help: str, *, choices: tuple[str, ...] | None = None, nargs: str | None = None) -> Any:
    metadata = {"help": help, "choices": choices, "nargs": nargs}
    return field(default=default, metadata=metadata)
