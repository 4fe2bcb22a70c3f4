"""``sglang-router`` in front of several SGLang servers: start, readiness, its list of workers, restart, stop."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from opd.errors import EngineError
from opd.serving.command import server_environment
from opd.serving.process import OwnedProcess, free_port

logger = logging.getLogger(__name__)

PACKAGE = "sglang_router"
POLL_SECONDS = 0.1
REQUEST_SECONDS = 10.0


def require_router() -> None:
    """
    Raises:
        EngineError: the package is not installed.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise EngineError(
            "`--use-sglang-router` needs the `sglang-router` package, which is not installed. Install it with "
            "`pip install sglang-router`, or drop the flag: prompts are then spread over the servers without it."
        )


class SGLangRouter:
    """Starts the router on construction; ``stop`` (or leaving a ``with`` block, or this process ending) ends it.

    It holds nothing but its list of workers and a picture of their prefix caches, so it can be started again at any
    time; requests that were passing through it fail and have to be sent again.

    Args:
        request_timeout_s: for one answer.

    Raises:
        EngineError: the package is not installed.
    """

    def __init__(
        self,
        workers: Iterable[str],
        *,
        log_path: str | Path,
        host: str = "127.0.0.1",
        port: int | None = None,
        request_timeout_s: float = 3600.0,
    ) -> None:
        require_router()
        self.log_path = Path(log_path)
        self.port = free_port(host) if port is None else port
        self.url = f"http://{host}:{self.port}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        command = router_command(
            workers, host=host, port=self.port, metrics_port=free_port(host), request_timeout_s=request_timeout_s
        )
        self._process = OwnedProcess(
            [sys.executable, "-m", "opd.serving.with_parent", str(os.getpid()), *command],
            environment=server_environment(os.environ, device="cpu"),  # it needs no GPU
            log_path=self.log_path,
        )
        logger.info("sglang-router starting at %s, log in %s", self.url, self.log_path)

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.alive()

    def wait_ready(
        self, workers: Iterable[str], timeout_s: float, *, sleep: Callable[[float], None] = time.sleep
    ) -> float:
        """Returns the seconds waited, once it counts all ``workers`` as healthy.

        Raises:
            EngineError: it ended, or not in time; the message carries the end of its log. It is ended.
        """
        started = time.monotonic()
        wanted = {url.rstrip("/") for url in workers}
        while not wanted <= self.healthy_workers():
            seconds = time.monotonic() - started
            if not self.alive():
                raise self._failure(f"ended with status {self._process.returncode}")
            if seconds > timeout_s:
                raise self._failure(f"did not find {', '.join(sorted(wanted))} healthy within {timeout_s:g} s")
            sleep(POLL_SECONDS)
        return time.monotonic() - started

    def healthy_workers(self) -> set[str]:
        """Addresses; none while it does not answer."""
        return {worker["url"].rstrip("/") for worker in self._workers() if worker.get("is_healthy")}

    def add(self, url: str, timeout_s: float) -> None:
        """Requests may go to the server at ``url`` from now on; waits until the router has found it healthy.

        Raises:
            EngineError: see ``wait_ready``.
        """
        self._ask("POST", "/workers", {"url": url})
        self.wait_ready([url], timeout_s)

    def remove(self, url: str) -> None:
        """No further request goes to the server at ``url``. Not an error for one that the router does not know."""
        for worker in self._workers():
            if worker["url"].rstrip("/") == url.rstrip("/"):
                self._ask("DELETE", f"/workers/{worker['id']}")

    def restart(self) -> None:
        """Ends what is left of it and starts it again at the same address, with the workers that it was started with.

        Raises:
            EngineError: ``stop`` was called.
        """
        self._process.restart()

    def stop(self) -> None:
        """Safe to call twice."""
        self._process.stop()

    def describe(self, what: str) -> str:
        tail = f"The end of its log ({self.log_path}):\n{self._process.log_tail()}"
        return f"sglang-router at {self.url} {what if self.alive() else 'has ended'}. {tail}"

    def __enter__(self) -> SGLangRouter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _workers(self) -> list[dict[str, Any]]:
        return (self._ask("GET", "/workers") or {}).get("workers", [])

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The decoded answer; None when there is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=REQUEST_SECONDS) as response:
                return json.loads(response.read() or b"null")
        except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError) as error:
            logger.debug("%s %s: %s", method, path, error)
            return None

    def _failure(self, what: str) -> EngineError:
        self._process.end()
        return EngineError(
            f"sglang-router at {self.url} {what}. The end of its log ({self.log_path}):\n{self._process.log_tail()}"
        )


def router_command(
    workers: Iterable[str], *, host: str, port: int, metrics_port: int, request_timeout_s: float
) -> list[str]:
    """The command line: a prompt goes to the server that has its prefix, unless that one is far busier."""
    command = [
        *(sys.executable, "-m", "opd.serving.router_main"),
        *("--host", host),
        *("--port", str(port)),
        *("--policy", "cache_aware"),
        *("--prometheus-host", host, "--prometheus-port", str(metrics_port)),  # it insists on serving them
        *("--request-timeout-secs", str(int(request_timeout_s))),
        *("--max-concurrent-requests", "-1"),
        *("--shutdown-grace-period-secs", "1"),
        *("--worker-startup-check-interval", "1"),
        *("--log-level", "warn"),
    ]
    return [*command, "--worker-urls", *workers]
