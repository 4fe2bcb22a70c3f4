"""One SGLang server process of ours: start, wait until it answers, watch, start again, stop."""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from opd.errors import EngineError
from opd.serving.command import ServerOptions, server_command, server_environment
from opd.serving.process import LOG_TAIL_LINES, OwnedProcess, free_port, wait_for_port

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2


class SGLangServer:
    """Starts the server on construction; ``stop`` (or leaving a ``with`` block, or this process ending) ends it.

    Args:
        log_path: file that receives the server's output, that of later starts behind that of the first.
        host: address to listen on; loopback by default.
        port: a free one without it. A restart listens on the same one.

    Raises:
        EngineError: the port stays in use.
    """

    def __init__(
        self, options: ServerOptions, *, log_path: str | Path, host: str = "127.0.0.1", port: int | None = None
    ) -> None:
        self.options = options
        self.log_path = Path(log_path)
        self.host = host
        if port is not None:
            wait_for_port(host, port)
        self.port = free_port(host) if port is None else port
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        self._process = OwnedProcess(
            server_command(options, host=host, port=self.port, parent_pid=os.getpid()),
            environment=server_environment(os.environ, device=options.device, memory_saver=options.memory_saver),
            log_path=self.log_path,
        )
        logger.info("SGLang server %s starting at %s, log in %s", options.model_path, self.url, self.log_path)

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.alive()

    def wait_ready(self, timeout_s: float, *, sleep: Callable[[float], None] = time.sleep) -> float:
        """Returns the seconds waited, once the server has generated a token.

        Raises:
            EngineError: it ended or did not answer in time; the message carries the end of its log. It is ended.
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

    def restart(self) -> None:
        """Ends what is left of it and starts it again: same options, same port, and the weights of ``model_path``.

        Raises:
            EngineError: ``stop`` was called.
        """
        self._process.restart()
        logger.info("SGLang server at %s starting again, log in %s", self.url, self.log_path)

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        return self._process.log_tail(lines)

    def stop(self) -> None:
        """Ends the server and its workers for good: SIGTERM, then SIGKILL. Safe to call twice."""
        self._process.stop()

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
        self._process.end()
        return EngineError(
            f"the SGLang server for `{self.options.model_path}` at {self.url} {what}. "
            f"The end of its log ({self.log_path}):\n{self.log_tail()}"
        )
