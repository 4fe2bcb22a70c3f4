"""Two machines train together, and a third one holds the teacher: network namespaces with addresses of their own.

The Ray head is in the first, a worker in the second; one training rank fits on each.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd.serving.command import ServerOptions, server_command, server_environment
from tests.cluster.network import Host, network
from tests.cluster.ray_runs import STEPS, RayRun, assert_same, run_environment
from tests.e2e import runs
from tests.e2e.runs import ROOT, TASK, tiny_flags

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

RAY_PORT = 6379  # nobody else is in the namespace
TEACHER_PORT = 30000
LAYOUT = {"actor_num_nodes": 2, "num_rollout": STEPS, "distributed_timeout_minutes": 2}


@dataclass(frozen=True, kw_only=True)
class Machines:
    head: Host
    teacher: Host


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("machines")
    ends: list[subprocess.Popen[bytes]] = []
    with network(3) as (head, worker, teacher), ExitStack() as stack:
        options = ServerOptions(model_path=str(TASK / "teacher"), device="cpu", dtype="float32")
        command = server_command(options, host=teacher.address, port=TEACHER_PORT)
        environment = server_environment(os.environ, device="cpu")
        _start(stack, ends, teacher, command, log=folder / "teacher.log", environment=environment)
        address, library = f"{head.address}:{RAY_PORT}", f"source {ROOT}/scripts/lib/ray.sh"
        starts = {
            head: f"start_ray_head {head.address} {RAY_PORT} {folder}/head.log --num-cpus 1",
            worker: f"start_ray_worker {worker.address} {address} {folder}/worker.log --num-cpus 1",
        }
        for host, start in starts.items():
            _start(stack, ends, host, ["bash", "-c", f"{library}; {start}; wait"], log=folder / f"{host.namespace}.log")
        stack.callback(lambda: [process.terminate() for process in ends])  # all at once: Ray takes its time
        _finish(head, ["bash", "-c", f"{library}; wait_for_ray {address} 2 120"])
        yield Machines(head=head, teacher=teacher)


def test_tensor_parallel_across_machines(machines: Machines, tmp_path: Path) -> None:
    alone, output = tmp_path / "alone", tmp_path / "ray"
    gkd = {"distillation_type": "gkd"}
    runs.run(tiny_flags(alone, num_rollout=STEPS, **gkd), log=tmp_path / "alone.log")
    flags = tiny_flags(output, tensor_model_parallel_size=2, **LAYOUT, **gkd)
    _assert_same_over_ray(machines, flags, output, runs.rows(alone))


def test_data_parallel_across_machines_with_a_teacher_on_a_third(machines: Machines, tmp_path: Path) -> None:
    url = f"http://{machines.teacher.address}:{TEACHER_PORT}"
    _finish(machines.head, ["bash", "-c", f"source {ROOT}/scripts/lib/sglang_server.sh; wait_for_server {url} 240"])
    teacher = {
        "opd_type": "sglang",
        "opd_teacher_load": None,
        "rm_url": f"{url}/generate",
        "opd_teacher_deadline": 60,
    }
    alone, output = tmp_path / "alone", tmp_path / "ray"
    with RayRun(tiny_flags(alone, num_rollout=STEPS, **teacher), folder=alone, prefix=machines.head.command([])) as run:
        assert run.wait(240) == 0, run.printed()
        wanted = run.rows()
    assert all(row["teacher_failures"] == 0 for row in wanted)
    _assert_same_over_ray(machines, tiny_flags(output, **LAYOUT, **teacher), output, wanted)


def _assert_same_over_ray(machines: Machines, flags: list[str], output: Path, wanted: list[dict]) -> None:
    address = f"{machines.head.address}:{RAY_PORT}"
    with RayRun([*flags, "--ray-address", address], folder=output, prefix=machines.head.command([])) as run:
        assert run.wait(240) == 0, run.printed()
        assert_same(run.rows(), wanted)
    assert (output / "ranks" / "actor_1.log").exists()


def _start(
    stack: ExitStack,
    ends: list[subprocess.Popen[bytes]],
    host: Host,
    command: list[str],
    *,
    log: Path,
    environment: dict[str, str] | None = None,
) -> None:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            host.command(command),
            cwd=ROOT,
            env=environment or run_environment(),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )

    def wait() -> None:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(wait)
    ends.append(process)


def _finish(host: Host, command: list[str]) -> None:
    done = subprocess.run(host.command(command), cwd=ROOT, env=run_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
