"""Runs the stock SGLang server, on machines without a GPU too.

    python -m opd.serving.sglang_cpu [--parent-pid PID] [--stock-attention] SERVER_ARGS...

SGLang's own workers are copies of the main process, which has made the CPU preparations (``cpu_start``). With CUDA
nothing is changed. ``--parent-pid`` ends the server and its workers when that process is gone, however it went.
``--stock-attention`` keeps SGLang's own attention on a CPU (see ``cpu_attention``).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Sequence
from typing import Any

PARENT_POLL_SECONDS = 1.0
STOCK_ATTENTION = "--stock-attention"


def install() -> None:
    """Makes ``import sglang`` work without CUDA. Idempotent; no-op with CUDA."""
    import torch

    if torch.cuda.is_available():
        return
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    from opd.torchvision_ops import define_missing_ops

    define_missing_ops()
    if not any(isinstance(finder, _KernelStubFinder) for finder in sys.meta_path):
        sys.meta_path.append(_KernelStubFinder())  # last, so that a real sgl_kernel wins


class _KernelStub(types.ModuleType):
    """``sgl_kernel`` has no CPU wheel. SGLang imports its names at module level and calls few of them on CPU paths:
    every name is a function that raises when it is called."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} needs a GPU build of sgl_kernel")

        missing.__name__ = name
        return missing


class _KernelStubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the top-level package only: SGLang tests for submodules and takes another path when they are absent."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "sgl_kernel":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _KernelStub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """The stub has nothing to run."""


def main(argv: list[str]) -> None:
    if argv[:1] == ["--parent-pid"]:
        _end_with_parent(int(argv[1]))  # before the imports, which take seconds
        argv = argv[2:]
    _prepare(stock_attention=STOCK_ATTENTION in argv)
    argv = [word for word in argv if word != STOCK_ATTENTION]
    import torch
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    from opd.serving import cpu_start

    load_plugins()
    if not torch.cuda.is_available():
        cpu_start.fork_workers()
    try:
        run_server(prepare_server_args(argv))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _end_with_parent(parent_pid: int) -> None:
    """Kills this process group once ``parent_pid`` is no longer our parent.

    The kernel's parent-death signal would be simpler, but it fires when the *thread* that started us ends.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(PARENT_POLL_SECONDS)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _prepare(*, stock_attention: bool) -> None:
    """Before SGLang is imported by anything else."""
    install()
    import torch

    if torch.cuda.is_available():
        return
    from opd.serving import cpu_attention, cpu_start

    cpu_start.import_less()
    if not stock_attention:
        cpu_attention.install()


if __name__ == "__main__":
    main(sys.argv[1:])
