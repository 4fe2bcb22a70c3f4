"""Where SGLang servers are started: on this machine, or wherever another ``ServerHost`` puts them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from opd.serving.command import ServerOptions
from opd.serving.server import SGLangServer


class Server(Protocol):
    """``SGLangServer``, or one on another machine that is spoken to as if it were here."""

    options: ServerOptions
    log_path: Path

    @property
    def url(self) -> str: ...

    def alive(self) -> bool: ...

    def wait_ready(self, timeout_s: float) -> float: ...

    def restart(self) -> None: ...

    def log_tail(self) -> str: ...

    def stop(self) -> None: ...


class ServerHost(Protocol):
    """
    Attributes:
        assigns_devices: a server finds its devices as the only ones, whatever ``ServerOptions.base_gpu_id``.
        on_gpus: whether the devices are GPUs.
        shares_memory: every server can read this process's shared memory.
    """

    assigns_devices: bool
    shares_memory: bool

    @property
    def on_gpus(self) -> bool: ...

    def start(self, number: int, options: ServerOptions, *, log_path: Path, port: int | None) -> Server:
        """Starts server ``number``, counted from 0, and returns before it is ready.

        Raises:
            EngineError: it could not be started.
        """


class ThisMachine:
    """``ServerHost`` of servers on loopback, which end with this process."""

    assigns_devices = False
    shares_memory = True

    @property
    def on_gpus(self) -> bool:
        import torch  # here: this module is light for those who start no server

        return torch.cuda.is_available()

    def start(self, number: int, options: ServerOptions, *, log_path: Path, port: int | None) -> Server:
        return SGLangServer(options, log_path=log_path, port=port)
