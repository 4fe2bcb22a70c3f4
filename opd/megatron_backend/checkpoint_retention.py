"""Which checkpoints of a run are kept (``--save-retain``, ``--save-retain-interval``), and deleting the others.

Only what is certainly this run's and whole is touched: folders ``iter_NNNNNNN`` with the files that a complete save
leaves, up to the one that the tracker names. A later one is of another run in the same folder; ``release/``, an export,
anything else is not a checkpoint of a step. One process (rank 0) calls this. Imports neither torch nor megatron.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opd.megatron_backend.checkpoint_layout import TEMPORARY, folder_name, latest_iteration

logger = logging.getLogger(__name__)

_COMPLETE = ("metadata.json", ".metadata", "common.pt")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The newest ``newest``, and those whose step is a multiple of ``interval``; neither: all."""

    newest: int | None = None
    interval: int | None = None

    def keeps(self, steps: list[int]) -> set[int]:
        """Of the steps that are there. The newest is always kept."""
        if self.newest is None and self.interval is None:
            return set(steps)
        newest = sorted(steps)[-(self.newest or 1) :]
        return set(newest) | {step for step in steps if self.interval is not None and step % self.interval == 0}


def prune(folder: Path, retention: Retention, *, companions: Iterable[Path] = ()) -> list[int]:
    """Deletes what is not kept from ``folder``, and from its companions (the critic's and the moving average's folder,
    whose checkpoints are of use only with the student's of the same step). Returns the steps that went.

    A folder that cannot be deleted costs a warning: the run is worth more than the space.
    """
    latest = latest_iteration(folder)
    if not isinstance(latest, int):
        return []
    there = [step for step in complete_steps(folder) if step <= latest]
    kept = retention.keeps(there) | {latest}
    gone = [step for step in there if step not in kept]
    for root in (*companions, folder):  # the student's last: after a crash the next call still knows of the step
        for step in complete_steps(root) if root.is_dir() else []:
            if step in gone and step != latest_iteration(root):
                _delete(root / folder_name(step))
    return gone


def complete_steps(folder: Path) -> list[int]:
    """The steps of whole checkpoints, ascending."""
    found = []
    for path in folder.iterdir():
        number = path.name.removeprefix("iter_")
        named = number.isdigit() and path.name == folder_name(int(number))
        if named and not path.is_symlink() and all((path / name).is_file() for name in _COMPLETE):
            found.append(int(number))
    return sorted(found)


def _delete(path: Path) -> None:
    """First out of sight, so that a crash leaves no half checkpoint; the next save clears such a leftover."""
    hidden = path.with_name(TEMPORARY + path.name)
    try:
        path.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("checkpoint `%s` is no longer needed and could not be deleted: %s", path, error)
