"""Whether all ranks see the same folder: every rank writes its own files of a checkpoint into it."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from opd.config.flags import flag_text
from opd.megatron_backend.checkpoint_layout import CheckpointError
from opd.megatron_backend.groups import patient_group
from opd.megatron_backend.over_ranks import from_first_rank
from opd.megatron_backend.snapshot import together

SEEN_SECONDS = 30.0  # until a network filesystem shows what another machine has written
POLL_SECONDS = 0.2


def check_shared(flag: str, folder: str) -> None:
    """All ranks call it together; ``folder`` is made where it is missing.

    Args:
        flag: in the schema, which names the folder.

    Raises:
        CheckpointError: on all ranks, when one does not see what the first one writes there.
    """
    if dist.get_world_size() == 1:
        return
    probe = Path(folder) / f".probe_{from_first_rank(uuid.uuid4().hex)}"
    first = dist.get_rank() == 0
    together((lambda: _write(probe)) if first else None, patient_group())
    try:
        together(None if first else lambda: _wait_for(probe), patient_group())
    except CheckpointError as error:
        raise CheckpointError(
            f"{flag_text(flag, folder)} is not one folder for all ranks: {error}. Give one that all machines share."
        ) from error
    finally:
        if first:
            probe.unlink(missing_ok=True)


def _write(probe: Path) -> None:
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.touch()


def _wait_for(probe: Path) -> None:
    deadline = time.monotonic() + SEEN_SECONDS
    while not probe.exists():
        if time.monotonic() > deadline:
            raise OSError(f"on {socket.gethostname()} it does not hold what rank 0 wrote")
        time.sleep(POLL_SECONDS)
