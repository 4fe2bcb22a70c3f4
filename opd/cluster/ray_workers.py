"""The Ray actors of a run. Each holds child processes on its node; the work itself is done in those.

Ray would restart or retry nothing here: a rank that is gone ends the run, which resumes from its checkpoint.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import ray

from opd.cluster.interfaces import interface_of
from opd.cluster.processes import Observed, RankOrder, RankProcess, free_port
from opd.serving.command import ServerOptions
from opd.serving.server import SGLangServer

THREADS = 8  # calls of one actor that are under way at the same time: a long wait must not hold up a stop


@dataclass(frozen=True, kw_only=True)
class Node:
    """Where an actor has been placed.

    Args:
        address: by which other nodes reach it.
        gpus: that Ray reserved for the actor.
    """

    node_id: str
    address: str
    hostname: str
    gpus: tuple[str, ...]

    @property
    def shown(self) -> str:
        return self.address if self.hostname == self.address else f"{self.address} ({self.hostname})"


def this_node() -> Node:
    node_id = ray.get_runtime_context().get_node_id()
    # The address that the node was started with; ``ray.util.get_node_ip_address`` gives the one that leads outside.
    (own,) = [node for node in ray.nodes() if node["NodeID"] == node_id]
    return Node(
        node_id=node_id,
        address=own["NodeManagerAddress"],
        hostname=socket.gethostname(),
        gpus=tuple(str(gpu) for gpu in ray.get_gpu_ids()),
    )


class RankWorker:
    """Holds one rank."""

    def __init__(self) -> None:
        self._process: RankProcess | None = None

    def node(self) -> Node:
        return this_node()

    def free_port(self) -> int:
        return free_port(this_node().address)

    def start(self, order: RankOrder, environment: dict[str, str]) -> None:
        """``environment``: of the run's driver, what the ranks are to have of it."""
        own = this_node().address
        interface = interface_of(own)
        described = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}
        self._process = RankProcess(order, described | dict(os.environ) | environment)

    def observe(self, offset: int | None, timeout_s: float) -> Observed:
        """See ``RankProcess.observe``."""
        return self._process.observe(offset, timeout_s)

    def signal(self, number: int) -> None:
        if self._process is not None:
            self._process.signal(number)

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()


class ServerWorker:
    """Holds one SGLang server.

    Args:
        environment: of the run's driver, what the servers are to have of it: the ranks have the same, and both ends of
            a weight broadcast must agree about NCCL.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)  # the server inherits it; nothing else runs here
        self._server: SGLangServer | None = None

    def node(self) -> Node:
        return this_node()

    def start(
        self, options: ServerOptions, log_path: str, port: int | None, host: str, gpus: tuple[str, ...] | None
    ) -> str:
        """Returns the server's address.

        Args:
            gpus: devices that it shares with training ranks; None: those that Ray reserved for this actor.
        """
        if gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        interface = interface_of(this_node().address)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        self._server = SGLangServer(options, log_path=Path(log_path), host=host, port=port)
        return self._server.url

    def alive(self) -> bool:
        return self._server is not None and self._server.alive()

    def wait_ready(self, timeout_s: float) -> float:
        """Raises:
        EngineError: see ``SGLangServer.wait_ready``.
        """
        return self._server.wait_ready(timeout_s)

    def restart(self) -> None:
        """Raises:
        EngineError: see ``SGLangServer.restart``.
        """
        self._server.restart()

    def log_tail(self) -> str:
        return self._server.log_tail()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
