"""One rank as a child process: what it is told, how it is started, what it leaves behind when it ends."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from opd.cluster.place import Place
from opd.config.schema import Config
from opd.errors import UserError
from opd.serving.process import OwnedProcess

POLL_SECONDS = 0.05
CHUNK_BYTES = 1 << 20
TAIL_LINES = 20
# Below the range from which the system gives ports to outgoing connections: a port found free stays free until its
# user has imported its packages.
_PORTS = range(12_000, 32_000)


class ClusterError(UserError):
    """Processes of a run that could not be placed or started, or that ended."""


@dataclass(frozen=True, kw_only=True)
class RankOrder:
    """
    Args:
        role: "actor" (a training rank) or "critic" (a rank of the critic's own world).
        world_size: of the role's world.
        master: address and port at which the role's ranks meet.
        folder: where the run was started.
        log_path: receives the rank's output.
    """

    config: Config
    role: str
    rank: int
    world_size: int
    local_rank: int
    master: tuple[str, int]
    folder: str
    log_path: str
    place: Place

    @property
    def shown(self) -> str:
        return f"{'training' if self.role == 'actor' else self.role} rank {self.rank}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a rank's own code ended, as it says itself; a killed one says nothing.

    Args:
        outcome: "done", "preempted", "interrupted", "refused" (an error for the person at the terminal) or "crashed".
        message: of the error, one line.
        at: seconds since the epoch.
    """

    outcome: str
    message: str = ""
    at: float

    def write(self, path: Path) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(vars(self)), encoding="utf-8")
        part.replace(path)

    @staticmethod
    def read(path: Path) -> Report | None:
        return Report(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


@dataclass(frozen=True, kw_only=True)
class End:
    """
    Args:
        status: of the process; negative: the signal that killed it.
        at: seconds since the epoch, when it was noticed.
        report: its own.
        tail: the last lines of its log.
    """

    status: int
    at: float
    report: Report | None = None
    tail: str = ""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """``text``: a piece of the log."""

    text: bytes
    end: End | None = None


class RankProcess:
    """Runs from its construction until it ends, ``stop``, or the end of this process.

    Args:
        environment: of the rank, in place of this process's.
    """

    def __init__(self, order: RankOrder, environment: dict[str, str]) -> None:
        self._log_path = Path(order.log_path)
        self._folder = tempfile.TemporaryDirectory(prefix="opd-rank-")
        order_path, self._report_path = Path(self._folder.name) / "order", Path(self._folder.name) / "report.json"
        order_path.touch(mode=0o600)  # it may hold a secret
        order_path.write_bytes(pickle.dumps((order, str(self._report_path))))
        self._ended_at: float | None = None
        self._process = OwnedProcess(
            [sys.executable, "-m", "opd.cluster.rank_main", str(order_path), str(os.getpid())],
            environment=rank_environment(order, environment),
            log_path=self._log_path,
        )

    def observe(self, offset: int | None, timeout_s: float) -> Observed:
        """What the log holds behind ``offset``, as soon as there is something; that it has ended, once all of the log
        was given; or nothing, when the time is up. Without an offset the log is of no interest."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self._process.returncode  # before the log is read: nothing may be written in between
            if ended is not None and self._ended_at is None:
                self._ended_at = time.time()
            text = b"" if offset is None else self._read(offset)
            if text or ended is not None or time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        if text or ended is None:
            return Observed(text=text)
        return Observed(
            text=b"",
            end=End(
                status=ended,
                at=self._ended_at or 0.0,
                report=Report.read(self._report_path),
                tail=self._process.log_tail(TAIL_LINES),
            ),
        )

    def signal(self, number: int) -> None:
        """Nothing happens when it has ended."""
        if self._process.returncode is None:
            os.kill(self._process.pid, signal.Signals(number))

    def stop(self) -> None:
        """Ends it and whatever it started. Safe to call twice."""
        self._process.stop()
        self._folder.cleanup()

    def _read(self, offset: int) -> bytes:
        with self._log_path.open("rb") as log:
            log.seek(offset)
            return log.read(CHUNK_BYTES)


def rank_environment(order: RankOrder, base: dict[str, str]) -> dict[str, str]:
    """``base`` with what torchrun would set, and without what Ray tells its own workers, save how to be let in."""
    address, port = order.master
    root = str(Path(__file__).resolve().parents[2])  # ``opd`` must be importable from any folder
    environment = {name: value for name, value in base.items() if not name.startswith("RAY_") or "AUTH" in name}
    environment |= {
        "RANK": str(order.rank),
        "WORLD_SIZE": str(order.world_size),
        "LOCAL_RANK": str(order.local_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (root, base.get("PYTHONPATH")))),
    }
    environment.setdefault("OMP_NUM_THREADS", "1")  # several ranks with a thread per core each crawl
    return environment


def free_port(address: str) -> int:
    """
    Raises:
        ClusterError: none is free, or ``address`` is not of this machine.
    """
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise ClusterError(f"no free port at {address} between {_PORTS.start} and {_PORTS.stop}. Free some.")
