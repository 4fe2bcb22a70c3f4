"""Child processes: one log over several lives, an end that is final, and none that outlives its parent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from opd.errors import EngineError
from opd.serving import router
from opd.serving.process import OwnedProcess, wait_for_port

pytestmark = pytest.mark.unit

SPEAKER = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_a_restart_keeps_the_log_and_a_stop_is_final(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    child = OwnedProcess(SPEAKER, environment=os.environ, log_path=log)
    wait_for(lambda: "here" in log.read_text())
    first = child.pid
    psutil.Process(first).kill()
    wait_for(lambda: not child.alive())
    child.restart()
    wait_for(lambda: log.read_text().count("here") == 2)
    assert child.alive() and child.pid != first
    assert child.log_tail(2).splitlines() == ["---- started again ----", "here"]
    child.stop()
    assert not child.alive()
    with pytest.raises(EngineError, match="stopped"):
        child.restart()


def test_a_wrapped_program_ends_with_its_grandparent(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'opd.serving.with_parent', str(os.getpid()), 'sleep', '60']\n"
        "print(subprocess.Popen(command, start_new_session=True).pid, flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    wrapper = psutil.Process(int(parent.stdout.readline()))
    wait_for(lambda: len(wrapper.children()) == 1)
    family = [wrapper, *wrapper.children()]
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))


def test_a_missing_router_package_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(router, "PACKAGE", "no_such_router")
    with pytest.raises(EngineError, match=r"--use-sglang-router.*pip install sglang-router"):
        router.SGLangRouter(["http://127.0.0.1:1"], log_path=tmp_path / "router.log")


def test_a_port_is_waited_for_and_one_that_stays_in_use_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} of 127.0.0.1 is in use"):
            wait_for_port("127.0.0.1", port, timeout_s=0)
        started = time.monotonic()
        threading.Timer(0.3, listener.close).start()
        wait_for_port("127.0.0.1", port, timeout_s=10)
        assert time.monotonic() - started >= 0.3
