"""Parameters of a server -> command line and environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from opd.serving.command import CONTEXT_SLACK, CPU_MAX_TOTAL_TOKENS, ServerOptions, server_command, server_environment

pytestmark = pytest.mark.unit


def _value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_cpu_server() -> None:
    options = ServerOptions(model_path="m", context_length=100, max_running_requests=8)
    command = server_command(options, host="127.0.0.1", port=1234, parent_pid=77)
    assert command[:5] == [sys.executable, "-m", "opd.serving.sglang_cpu", "--parent-pid", "77"]
    assert _value(command, "--device") == "cpu"
    assert _value(command, "--dtype") == "float32"
    assert _value(command, "--attention-backend") == "torch_native"
    assert _value(command, "--context-length") == str(100 + CONTEXT_SLACK)
    assert _value(command, "--max-total-tokens") == str(8 * (100 + CONTEXT_SLACK))
    assert "--disable-radix-cache" not in command
    assert "--mem-fraction-static" not in command


def test_the_cpu_cache_is_bounded_but_holds_one_sequence() -> None:
    many = server_command(ServerOptions(model_path="m", max_running_requests=1000), host="h", port=1)
    assert _value(many, "--max-total-tokens") == str(CPU_MAX_TOTAL_TOKENS)
    long = server_command(ServerOptions(model_path="m", context_length=100_000), host="h", port=1)
    assert int(_value(long, "--max-total-tokens")) > 100_000


def test_gpu_server() -> None:
    options = ServerOptions(
        model_path="m", device="cuda", dtype="bfloat16", tp_size=2, base_gpu_id=4, mem_fraction_static=0.6,
        trust_remote_code=True, api_key="k", extra_args=("--enable-metrics",),
    )  # fmt: skip
    command = server_command(options, host="0.0.0.0", port=1)
    assert "--parent-pid" not in command
    assert "--attention-backend" not in command
    assert "--max-total-tokens" not in command
    assert _value(command, "--tp-size") == "2"
    assert _value(command, "--base-gpu-id") == "4"
    assert _value(command, "--mem-fraction-static") == "0.6"
    assert command[-4:] == ["--trust-remote-code", "--api-key", "k", "--enable-metrics"]


def test_a_server_that_can_give_its_memory_away_does_not_generate_for_health_checks() -> None:
    options = ServerOptions(model_path="m", device="cuda", memory_saver=True)
    assert "--enable-memory-saver" in server_command(options, host="h", port=1)
    assert "--enable-memory-saver" not in server_command(ServerOptions(model_path="m"), host="h", port=1)
    name = "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"
    assert server_environment({}, device="cuda", memory_saver=True)[name] == "false"
    assert name not in server_environment({}, device="cuda")


def test_environment_hides_the_launchers_ranks_and_finds_the_package() -> None:
    base = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_PORT": "1", "PYTHONPATH": "/x", "HOME": "/h"}
    base["OMP_NUM_THREADS"] = "2"
    environment = server_environment(base, device="cpu")
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & environment.keys()
    root, rest = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(root) / "opd" / "serving").is_dir()
    assert rest == "/x"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["HOME"] == "/h"
    assert server_environment({}, device="cpu")["OMP_NUM_THREADS"] == "1"
    assert "SGLANG_USE_CPU_ENGINE" not in server_environment({}, device="cuda")
