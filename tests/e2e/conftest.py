"""Real SGLang teachers for whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opd.serving.command import ServerOptions
from opd.serving.server import SGLangServer
from tests.e2e.runs import TASK


def tiny_options(model: Path) -> ServerOptions:
    return ServerOptions(model_path=str(model), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def student_as_teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    log = tmp_path_factory.mktemp("student-server") / "server.log"
    with SGLangServer(tiny_options(TASK / "student"), log_path=log) as server:
        server.wait_ready(180)
        yield server


@pytest.fixture
def teacher_server(tmp_path: Path) -> Iterator[Callable[..., SGLangServer]]:
    """Starts a teacher server, on a given port if asked; all are stopped at the end."""
    servers: list[SGLangServer] = []

    def start(port: int | None = None, model: Path = TASK / "teacher") -> SGLangServer:
        log = tmp_path / f"teacher-{len(servers)}.log"
        servers.append(SGLangServer(tiny_options(model), log_path=log, port=port))
        servers[-1].wait_ready(180)
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
