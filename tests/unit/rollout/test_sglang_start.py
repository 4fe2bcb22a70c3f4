"""What the flags make of the servers' command lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd.config.flags import parse_flags
from opd.errors import EngineError
from opd.rollout.sglang_start import start_servers
from opd.serving.command import ServerOptions, server_command
from opd.serving.hosts import ThisMachine

pytestmark = pytest.mark.unit


def test_flags_for_the_server_end_its_command_line(tmp_path: Path) -> None:
    commands = []

    class Recorder(ThisMachine):
        def start(self, number: int, options: ServerOptions, *, log_path: Path, port: int | None) -> None:
            commands.append(server_command(options, host="h", port=1))
            raise EngineError("not started")

    flags = (
        "--sglang-dp-size 4 --sglang-cuda-graph-bs 1 2 --rollout-engine sglang --hf-checkpoint m --output-dir".split()
    )
    config = parse_flags([*flags, str(tmp_path)])
    with pytest.raises(EngineError, match="not started"):
        start_servers(config, dtype=torch.float32, device=torch.device("cpu"), max_context_len=100, host=Recorder())
    assert commands[0][-5:] == ["--dp-size", "4", "--cuda-graph-bs", "1", "2"]
