"""A child process of ours with a log: started, watched, started again on its death, and never left behind."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

import psutil

from opd.errors import EngineError

logger = logging.getLogger(__name__)

LOG_TAIL_LINES = 12
LOG_LINE_CHARACTERS = 300  # one line of SGLang's log holds all its settings, 12,000 characters
PORT_SECONDS = 10.0
PORT_POLL_SECONDS = 0.2
TERM_SECONDS = 1.5  # SGLang polls for its end every 5 s; nothing of ours is lost when it is killed instead


class OwnedProcess:
    """Runs from its construction until ``stop``, its collection, or the end of this process.

    Args:
        log_path: receives its output; emptied at the first start, appended to at the later ones.
    """

    def __init__(self, command: list[str], *, environment: Mapping[str, str], log_path: Path) -> None:
        self.command = command
        self.log_path = log_path
        self._environment = dict(environment)
        self._lock = threading.Lock()  # a restart on one thread and the stop on another
        self._stopped = False
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.write_bytes(b"")
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def alive(self) -> bool:
        return self._process.poll() is None

    def restart(self) -> None:
        """Ends what is left of it and starts it again, with the same command.

        Raises:
            EngineError: it was stopped for good.
        """
        with self._lock:
            if self._stopped:
                raise EngineError(f"`{self.command[0]}` was stopped: it is not started again")
            self._finalizer()
            with self.log_path.open("ab") as log:
                log.write(b"---- started again ----\n")
            self._start()

    def end(self) -> None:
        """Ends it and its workers: SIGTERM, then SIGKILL. ``restart`` may follow."""
        with self._lock:
            self._finalizer()

    def stop(self) -> None:
        """``end`` for good. Safe to call twice."""
        with self._lock:
            self._stopped = True
            self._finalizer()

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - 16_384))
            text = log.read().decode("utf-8", errors="replace")
        return "\n".join(line[:LOG_LINE_CHARACTERS] for line in text.splitlines()[-lines:])

    def _start(self) -> None:
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # a process group of its own, so that stopping reaches every worker
            )
        # Runs when this object is collected and at interpreter exit, so that an exception leaves no orphans.
        self._finalizer = weakref.finalize(self, _stop_group, self._process, os.getpid())


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def wait_for_port(host: str, port: int, *, timeout_s: float = PORT_SECONDS) -> None:
    """Until nobody listens there: the servers of a run that was killed end a moment after it.

    Raises:
        EngineError: somebody still does.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed connection is no one
            try:
                return probe.bind((host, port))
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise EngineError(
                        f"port {port} of {host} is in use ({error.strerror}). End the program that listens there, or "
                        "give another port."
                    ) from error
        time.sleep(PORT_POLL_SECONDS)


def own_address(*, towards: str) -> str:
    """The address of this machine from which it reaches the host ``towards``, loopback for itself. Sends nothing."""
    family, _, _, _, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _stop_group(process: subprocess.Popen[bytes], owner: int) -> None:
    """Ends the process, its group and whatever its workers started in groups of their own."""
    if os.getpid() != owner:  # a fork of the owner is exiting
        return
    workers = _descendants(process)
    _signal_group(process.pid, signal.SIGTERM)
    try:
        process.wait(TERM_SECONDS)
    except subprocess.TimeoutExpired:
        logger.debug("process %d did not end on SIGTERM", process.pid)
    _signal_group(process.pid, signal.SIGKILL)
    for worker in workers:
        if worker.is_running():  # psutil compares start times, so a reused pid is left alone
            worker.kill()
    process.wait()
    psutil.wait_procs(workers, timeout=5)


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    if process.poll() is not None:
        return []
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass  # all of it has ended
