"""Teacher servers that the run starts: their options and address, and what happens when one dies."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from opd.config.flags import parse_flags
from opd.config.schema import Config
from opd.errors import EngineError
from opd.serving.command import ServerOptions
from opd.serving.teacher_servers import TeacherServers


class StandInServer:
    """Lives until ``dies`` is set; counts what is done to it."""

    def __init__(self, options: ServerOptions, number: int, log_path: Path) -> None:
        self.options = options
        self.log_path = log_path
        self.url = f"http://10.0.0.{number}:1"
        self.dies = False
        self.restarts = self.stops = 0

    def alive(self) -> bool:
        return not self.dies

    def wait_ready(self, timeout_s: float) -> float:
        if self.dies:
            raise EngineError(f"no answer within {timeout_s:g} s")
        return 0.1

    def restart(self) -> None:
        self.restarts += 1
        self.dies = False

    def log_tail(self) -> str:
        return ""

    def stop(self) -> None:
        self.stops += 1


class StandInHost:
    shares_memory = True

    def __init__(self, *, on_gpus: bool, assigns_devices: bool, limit: int = 9) -> None:
        self.on_gpus = on_gpus
        self.assigns_devices = assigns_devices
        self.limit = limit
        self.servers: list[StandInServer] = []

    def start(self, number: int, options: ServerOptions, *, log_path: Path, port: int | None) -> StandInServer:
        if number >= self.limit:
            raise EngineError("no place left")
        self.servers.append(StandInServer(options, number, log_path))
        return self.servers[-1]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 777}))
    flags = (
        f"--opd-teacher-serve {tmp_path} --output-dir {tmp_path}/out --opd-teacher-num-gpus 4 --sglang-max-restarts 1"
    )
    flags += (
        " --opd-teacher-num-gpus-per-engine 2 --rollout-engine sglang --rollout-num-gpus 3 --actor-num-gpus-per-node 2"
    )
    return parse_flags(flags.split())


def test_devices_are_behind_those_of_the_run_or_assigned(config: Config) -> None:
    own, assigned = StandInHost(on_gpus=True, assigns_devices=False), StandInHost(on_gpus=False, assigns_devices=True)
    with TeacherServers(config, own) as servers, TeacherServers(config, assigned):
        assert servers.url == "http://10.0.0.0:1/generate,http://10.0.0.1:1/generate"
    assert [server.options.base_gpu_id for server in own.servers] == [2 + 3, 2 + 3 + 2]
    assert [server.options.base_gpu_id for server in assigned.servers] == [0, 0]
    options = own.servers[0].options
    assert (options.device, options.dtype, options.tp_size, options.context_length) == ("cuda", "bfloat16", 2, 777)
    assert (assigned.servers[0].options.device, assigned.servers[0].options.dtype) == ("cpu", "float32")
    assert [server.stops for server in own.servers] == [1, 1]


def test_a_dead_server_is_started_again_as_often_as_allowed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.serving.teacher_servers.WATCH_SECONDS", 0.01)
    host = StandInHost(on_gpus=False, assigns_devices=True)
    with TeacherServers(config, host) as servers:
        servers.wait_ready()
        first = host.servers[0]
        first.dies = True
        deadline = time.monotonic() + 5
        while not first.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (first.restarts, host.servers[1].restarts) == (1, 0)
        first.dies = True
        time.sleep(0.1)
        assert first.restarts == 1


def test_none_is_left_when_one_cannot_be_started(config: Config) -> None:
    host = StandInHost(on_gpus=False, assigns_devices=True, limit=1)
    with pytest.raises(EngineError, match="no place left"):
        TeacherServers(config, host)
    assert host.servers[0].stops == 1
