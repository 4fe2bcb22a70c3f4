"""One SGLang server process of ours: start, wait until it answers, watch, stop."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil

from opd.errors import EngineError
from opd.serving.command import ServerOptions, server_command, server_environment

logger = logging.getLogger(__name__)

LOG_TAIL_LINES = 12
LOG_LINE_CHARACTERS = 300  # one line of SGLang's log holds all its settings, 12,000 characters
TERM_SECONDS = 1.5  # SGLang polls for its end every 5 s; nothing of ours is lost when it is killed instead
POLL_SECONDS = 0.2


class SGLangServer:
    """Starts the server on construction; ``stop`` (or leaving a ``with`` block, or this process ending) ends it.

    Args:
        log_path: file that receives the server's output.
        host: address to listen on; loopback by default.
        port: a free one without it.
    """

    def __init__(
        self, options: ServerOptions, *, log_path: str | Path, host: str = "127.0.0.1", port: int | None = None
    ) -> None:
        self.options = options
        self.log_path = Path(log_path)
        self.host = host
        self.port = free_port(host) if port is None else port
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = server_command(options, host=host, port=self.port, parent_pid=os.getpid())
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(os.environ, device=options.device),
                start_new_session=True,  # a process group of its own, so that stopping reaches every worker
            )
        # Runs when this object is collected and at interpreter exit, so that an exception leaves no orphans.
        self._finalizer = weakref.finalize(self, _stop_group, self._process, os.getpid())
        logger.info("SGLang server %s starting at %s, log in %s", options.model_path, self.url, self.log_path)

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, timeout_s: float, *, sleep: Callable[[float], None] = time.sleep) -> float:
        """Returns the seconds waited, once the server has generated a token.

        Raises:
            EngineError: it ended or did not answer in time; the message carries the end of its log. It is stopped.
        """
        started = time.monotonic()
        while not self._answers():
            seconds = time.monotonic() - started
            if not self.alive():
                raise self._failure(f"ended with status {self._process.returncode} while starting")
            if seconds > timeout_s:
                raise self._failure(
                    f"did not answer within {timeout_s:g} s. Give it longer with --sglang-server-timeout"
                )
            sleep(POLL_SECONDS)
        return time.monotonic() - started

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - 16_384))
            text = log.read().decode("utf-8", errors="replace")
        return "\n".join(line[:LOG_LINE_CHARACTERS] for line in text.splitlines()[-lines:])

    def stop(self) -> None:
        """Ends the server and its workers: SIGTERM, then SIGKILL. Safe to call twice."""
        self._finalizer()

    def __enter__(self) -> SGLangServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _answers(self) -> bool:
        body = json.dumps({"input_ids": [0], "sampling_params": {"temperature": 0, "max_new_tokens": 1}}).encode()
        headers = {"Content-Type": "application/json"}
        if self.options.api_key is not None:
            headers["Authorization"] = f"Bearer {self.options.api_key}"
        request = urllib.request.Request(f"{self.url}/generate", data=body, headers=headers)
        try:
            with self._opener.open(request, timeout=30) as response:
                return response.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _failure(self, what: str) -> EngineError:
        self.stop()
        return EngineError(
            f"the SGLang server for `{self.options.model_path}` at {self.url} {what}. "
            f"The end of its log ({self.log_path}):\n{self.log_tail()}"
        )


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _stop_group(process: subprocess.Popen[bytes], owner: int) -> None:
    """Ends the process, its group and whatever its workers started in groups of their own."""
    if os.getpid() != owner:  # a fork of the owner is exiting
        return
    workers = _descendants(process)
    _signal_group(process.pid, signal.SIGTERM)
    try:
        process.wait(TERM_SECONDS)
    except subprocess.TimeoutExpired:
        logger.debug("SGLang server %d did not end on SIGTERM", process.pid)
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
