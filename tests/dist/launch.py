"""Runs one test function in several processes that form a world over loopback, and brings back what each returned.

    results = launch("tests.dist.workers:logits", ranks=2, arguments={"folder": str(tmp_path)}, timeout_s=90)

The function gets ``arguments`` as keywords and finds RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment.
When one process fails or the time is up, all are ended and the failure's output is raised. A process whose parent is
gone ends itself.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests import warm


def launch(function: str, *, ranks: int, arguments: dict[str, Any] | None = None, timeout_s: float = 120) -> list[Any]:
    """Returns one picklable result per rank.

    Raises:
        AssertionError: a process failed or the time was up; with the output of the ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = ["-m", "tests.dist.launch", function, json.dumps(arguments or {}), folder]
        processes: list[warm.Process] = []
        try:
            for rank in range(ranks):
                with (work / f"{rank}.log").open("wb") as log:
                    environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    processes.append(warm.start(command, environment=environment, stdout=log, stderr=log))
            _wait(processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        codes = [process.returncode for process in processes]
        if any(codes):
            logs = "\n".join(
                f"--- rank {r}: {codes[r]}\n{(work / f'{r}.log').read_text()[-4000:]}" for r in range(ranks)
            )
            raise AssertionError(f"{function} on {ranks} ranks failed or took over {timeout_s} s\n{logs}")
        return [pickle.loads((work / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


def free_port() -> int:
    """Below the range from which the system gives ports to outgoing connections: it stays free until it is used."""
    while True:
        port = random.randrange(12000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _wait(processes: list[warm.Process], deadline: float) -> None:
    """Until all have ended, one has failed, or the time is up."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return
        time.sleep(0.05)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _main(function: str, arguments: str, folder: str) -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    (Path(folder) / f"{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
