"""Processes that start with their libraries imported.

Importing torch, megatron-core and transformers takes 7 s of a core, and most runs here take less after it. One waiting
process per test worker imports them once; each process that a test starts is a copy of it (``fork``), with its own
arguments, environment, output and limits, which is killed and waited for like any other. Two things are not as in an
interpreter of its own: the order of imports, and the seed of string hashes, which all copies share. So some starts of
each kind stay cold. With CUDA, which does not outlive a fork, all of them are.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# In this order: ``device`` prepares torch for a machine without CUDA before megatron-core is imported.
BEFORE_MEGATRON = ("opd.build", "opd.step")
LIBRARIES = (
    "opd.megatron_backend.build",
    "opd.report.reporter",
    "opd.teachers.coloaded_teacher",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)


class WarmProcess:
    """What tests use of ``subprocess.Popen``.

    Raises:
        ConnectionError: the waiting process has ended; what it printed says why.
    """

    def __init__(self, argv: list[str], report: socket.socket) -> None:
        self.args = argv
        self.returncode: int | None = None
        self._report = report
        self.pid = self._read()

    def poll(self) -> int | None:
        return self.returncode if self._ended(0) else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; minus the signal's number if one ended it.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> bool:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            self.returncode = self._read()
            self._report.close()
        return self.returncode is not None

    def _read(self) -> int:
        message = self._report.recv(32)
        if not message:
            raise ConnectionError("the process of tests/warm.py that makes the copies has ended")
        return int(message)


Process = WarmProcess | subprocess.Popen[bytes]


def start(
    argv: list[str],
    *,
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
    stdout: IO[Any],
    stderr: IO[Any],
    file_limit: int | None = None,
) -> Process:
    """``python ARGV...`` in a copy: argv is a script and its arguments, or ``-m``, a module and its arguments.

    Args:
        environment: instead of this process's own.
        file_limit: bytes that one file may have.
    """
    job = Job(argv=argv, cwd=str(cwd), environment=dict(environment or os.environ), file_limit=file_limit)
    if torch.cuda.is_available():
        command, limit = [sys.executable, *argv], partial(_limit_files, file_limit)
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=job.environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            preexec_fn=limit,
        )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        descriptors = [stdout.fileno(), stderr.fileno(), theirs.fileno()]
        socket.send_fds(_waiting_process(), [json.dumps(vars(job)).encode()], descriptors)
    return WarmProcess(argv, ours)


def run(argv: list[str], *, cwd: Path = ROOT, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` with captured text."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start(argv, cwd=cwd, stdout=stdout, stderr=stderr)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(argv, code, stdout.read(), stderr.read())


@cache
def _waiting_process() -> socket.socket:
    """It ends, with all its copies, when this socket is closed, however this process ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    with theirs:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    atexit.register(process.wait)
    atexit.register(ours.close)  # before the wait
    return ours


@dataclass(frozen=True, kw_only=True)
class Job:
    argv: list[str]
    cwd: str
    environment: dict[str, str]
    file_limit: int | None


def _import_libraries() -> None:
    for name in BEFORE_MEGATRON:
        importlib.import_module(name)
    from opd.megatron_backend import device

    device.install()
    for name in LIBRARIES:
        importlib.import_module(name)
    if threading.active_count() > 1 or len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("an import started a thread: a copy of this process would not have it")


def _serve(control: socket.socket) -> Job | None:
    """Makes a copy for each request and reports how it ended. Returns the job in the copy, None at the end."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(
        signal.SIGCHLD, lambda number, frame: None
    )  # a handler of Python's, or nothing is written to ``wake``
    reports: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            os.read(woken, 512)
        _report_ended(reports)
        if control not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 3)
        if not message:
            for pid in reports:
                os.kill(pid, signal.SIGKILL)
            return None
        report = socket.socket(fileno=descriptors.pop())
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for left in (control, report, *reports.values()):
                left.close()
            for number, descriptor in enumerate(descriptors, start=1):
                os.dup2(descriptor, number)
            for descriptor in (*descriptors, woken, wake):
                os.close(descriptor)
            return Job(**json.loads(message))
        for descriptor in descriptors:
            os.close(descriptor)
        reports[pid] = report
        report.send(str(pid).encode())


def _report_ended(reports: dict[int, socket.socket]) -> None:
    for pid in list(reports):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with reports.pop(pid) as report:
                try:
                    report.send(str(os.waitstatus_to_exitcode(status)).encode())
                except BrokenPipeError:
                    continue  # nobody waits for it any more


def _become(job: Job) -> None:
    """What ``python ARGV...`` does once its interpreter runs."""
    os.environ.clear()
    os.environ.update(job.environment)
    os.chdir(job.cwd)
    _limit_files(job.file_limit)
    name = job.argv[0]
    first = job.cwd if name == "-m" else str(Path(name).resolve().parent)
    paths = filter(None, job.environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [first, *dict.fromkeys([*paths, *sys.path[1:]])]
    importlib.invalidate_caches()
    if name == "-m":
        sys.argv = job.argv[1:]
        runpy.run_module(job.argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(job.argv)
        runpy.run_path(name, run_name="__main__")


def _limit_files(size: int | None) -> None:
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _main(descriptor: int) -> None:
    control = socket.socket(fileno=descriptor)
    _import_libraries()
    job = _serve(control)
    if job is not None:
        _become(job)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
