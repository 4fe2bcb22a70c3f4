"""A file that is there whole or not at all: written beside its place, then renamed into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` is given the path to write to, on the same disk.

    Raises:
        OSError: it could not be written; an older file is then still whole, and nothing is left beside it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
