"""A run's numbers in Prometheus' text format, over HTTP: ``--prometheus-port``.

    http://127.0.0.1:PORT/metrics
    opd_reward_mean 0.531              of the latest step that knows it, every metric of metrics.jsonl by its name
    opd_last_report_timestamp_seconds  when that was: alert when it stands still
    opd_run_steps_total, opd_run_tokens_total, opd_run_samples_total     since this process started
    process_resident_memory_bytes, process_cpu_seconds_total, python_info ...

A resumed run is a new process, whose counters start at 0: ``rate()`` and ``increase()`` know what to make of it.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Mapping
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from opd.config.flags import ConfigError, flag_text

logger = logging.getLogger(__name__)

PREFIX = "opd_"
POLL_SECONDS = 0.1  # between two looks at whether to stop


class PrometheusSink:
    """A ``Sink`` that answers GET requests from a daemon thread.

    Args:
        port: 0 takes a free one.
        host: address to listen on.

    Raises:
        ConfigError: the address is in use or is not this machine's, or prometheus_client is not installed.
    """

    def __init__(self, port: int, host: str) -> None:
        try:
            from prometheus_client import (
                CollectorRegistry,
                Counter,
                Gauge,
                PlatformCollector,
                ProcessCollector,
                make_wsgi_app,
            )
        except ImportError as error:
            raise ConfigError(
                f"{flag_text('prometheus_port', port)} needs the prometheus_client package, which is not installed. "
                "Install it with `pip install prometheus-client`, or drop the flag."
            ) from error
        self._gauge = Gauge
        self._registry = CollectorRegistry()  # of its own: a second run in this process is not in the way
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._gauges: dict[str, Any] = {}
        self._last_report = Gauge(
            f"{PREFIX}last_report_timestamp_seconds", "Time of the latest report.", registry=self._registry
        )
        self._counters = {
            name: Counter(f"{PREFIX}run_{name}", f"{text} since this process started.", registry=self._registry)
            for name, text in (
                ("steps", "Training steps"),
                ("tokens", "Response tokens trained on"),
                ("samples", "Samples of the rollouts"),
            )
        }
        try:
            self._server = _Server(host, port)
        except OSError as error:  # socket.gaierror, of a host that has no address, is one
            raise ConfigError(
                f"{flag_text('prometheus_port', port)}: cannot listen on {host}:{port} ({error.strerror or error}). "
                "Choose a free port, or with --prometheus-host an address of this machine."
            ) from error
        self._server.set_app(make_wsgi_app(self._registry))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_SECONDS,), name="prometheus", daemon=True
        )
        self._thread.start()
        self.port: int = self._server.server_port
        logger.info("metrics for Prometheus at http://%s:%d/metrics", host, self.port)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for name, value in {**numbers, "step": step}.items():
            self._gauge_of(name).set(value)
        if step > 0:  # 0 is the evaluation before training
            self._counters["steps"].inc()
            self._counters["tokens"].inc(numbers.get("tokens", 0))
            self._counters["samples"].inc(numbers.get("samples", 0))
        self._last_report.set_to_current_time()

    def close(self) -> None:
        """Frees the port. Safe to call twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge_of(self, name: str) -> Any:
        shown = gauge_name(name)
        if shown not in self._gauges:
            self._gauges[shown] = self._gauge(
                shown, f"{name} of the latest step that has it, see docs/metrics.md.", registry=self._registry
            )
        return self._gauges[shown]


class _Server(ThreadingMixIn, WSGIServer):
    """One thread per request: a client that reads slowly keeps no other waiting, nor the end of the run."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        # The host may be an IPv6 address, or a name.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        super().__init__(address[:2], _SilentHandler)

    def server_bind(self) -> None:
        """Without the base class's look-up of the address's name: where no name server answers it takes 10 s."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]
        self.setup_environ()


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A line on stderr for every scrape would go through the progress bars."""


def gauge_name(metric: str) -> str:
    """``eval/held-out_accuracy`` -> ``opd_eval_held_out_accuracy``; ``opd_`` is not written twice."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", metric.removeprefix(PREFIX))
