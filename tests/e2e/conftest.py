"""Real SGLang teachers for whole runs, one per test file: a test that kills its teacher starts it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from opd.serving.command import ServerOptions
from opd.serving.server import SGLangServer
from tests.e2e.runs import TASK

START_SECONDS = 180.0


@pytest.fixture(scope="module")
def start_teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], SGLangServer]]:
    """Starts a server of a model folder and waits for it; all are stopped at the end of the file."""
    with ExitStack() as stack:

        def start(model: Path) -> SGLangServer:
            options = ServerOptions(model_path=str(model), device="cpu", dtype="float32")
            log = tmp_path_factory.mktemp("teacher") / "server.log"
            server = stack.enter_context(SGLangServer(options, log_path=log))
            server.wait_ready(START_SECONDS)
            return server

        yield start


@pytest.fixture(scope="module")
def teacher(start_teacher: Callable[[Path], SGLangServer]) -> SGLangServer:
    return start_teacher(TASK / "teacher")


@pytest.fixture(scope="module")
def student_as_teacher(start_teacher: Callable[[Path], SGLangServer]) -> SGLangServer:
    return start_teacher(TASK / "student")
