"""The 8B launch scripts: parsed by bash and dry-run against stub folders; the teacher server's start, wait and stop."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "on_policy_distillation"
LIB = ROOT / "scripts" / "lib" / "sglang_server.sh"
SCRIPTS = sorted([*(ROOT / "examples").rglob("*.sh"), *(ROOT / "scripts").rglob("*.sh"), ROOT / ".ci" / "run"])

QWEN3_8B = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
QWEN3_32B = {
    **QWEN3_8B,
    "num_hidden_layers": 64,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
}

STUB_SERVER = """
import http.server, subprocess, sys
if "--dies" in sys.argv:
    sys.exit("the weights are broken")
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # a worker, as SGLang has
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_bash_parses(script: Path) -> None:
    ended = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """What the scripts expect under $BASE, configs and no weights."""
    for name, shape in (
        ("Qwen3-8B", QWEN3_8B),
        ("Qwen3-8B_torch_dist/hf", QWEN3_8B),
        ("Qwen3-32B_torch_dist/hf", QWEN3_32B),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(shape))
    for name in ("Qwen3-8B_torch_dist", "Qwen3-32B_torch_dist"):
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "dapo-math-17k").mkdir()
    (tmp_path / "dapo-math-17k" / "dapo-math-17k.jsonl").write_text('{"prompt": "1 + 1 =", "label": "2"}\n')
    return tmp_path


def dry_run(script: str, base: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environ = {
        **os.environ,
        "BASE": str(base),
        "RUN": str(base / "run"),
        "DRY_RUN": "1",
        "PYTHON": sys.executable,
        "COLUMNS": "200",
    }
    argv = ["bash", str(EXAMPLES / script), *flags]
    return subprocess.run(argv, capture_output=True, text=True, env=environ, stdin=subprocess.DEVNULL, timeout=60)


@pytest.mark.parametrize(
    ("script", "teacher"),
    [
        ("run-qwen3-8B-opd.sh", "server at http://127.0.0.1:13141/generate"),
        ("run-qwen3-8B-opd-megatron.sh", "checkpoint release: 32,762,123,264 parameters, bf16"),
    ],
)
def test_dry_run_of_the_8b_scripts(base: Path, script: str, teacher: str) -> None:
    ended = dry_run(script, base)
    assert ended.returncode == 0, ended.stderr
    text = " ".join(ended.stdout.split())
    assert "8,190,735,360 parameters, bf16" in text
    assert teacher in text
    assert "4 ranks: tensor 2 x pipeline 1 x context 1 x data 2, sequence parallel, optimizer states sharded" in text
    assert "16 prompts x 4 answers = 64 samples" in text
    assert not (base / "run").exists()


def test_further_flags_win_and_a_wrong_one_ends_the_script(base: Path) -> None:
    ended = dry_run("run-qwen3-8B-opd.sh", base, "--opd-kl-coef", "-1")
    assert ended.returncode == 2
    assert "error: `--opd-kl-coef=-1.0` must be at least 0." in ended.stderr


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def stub_python(tmp_path: Path) -> Path:
    """Stands in for python: the server module becomes a stub with one worker, everything else is the real one."""
    (tmp_path / "server.py").write_text(STUB_SERVER)
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/bash\n[[ $1 == -m ]] && exec "{sys.executable}" "{tmp_path}/server.py" "$@"\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    stub.chmod(0o755)
    return stub


def run_lib(code: str, stub_python: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHON": str(stub_python)}
    code = f'set -euo pipefail; source "{LIB}"; {code}'
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=environ, timeout=60)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes whose command line names the folder: the stub server (its worker is its child)."""
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(str(folder / "server.py") == word for word in p.info["cmdline"] or [])
    ]


def test_the_server_and_its_workers_end_with_the_script(stub_python: Path, tmp_path: Path) -> None:
    port = free_port()
    code = f"start_sglang_server model {port} {tmp_path}/log/teacher.log; wait_for_server http://127.0.0.1:{port} 20; "
    code += 'echo "$SGLANG_SERVER_PID"; ps -o pid= --ppid "$SGLANG_SERVER_PID"'
    ended = run_lib(code, stub_python)
    assert ended.returncode == 0, ended.stderr
    server, worker = (int(word) for word in ended.stdout.split())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (running(server) or running(worker)):
        time.sleep(0.05)
    assert not running(server)
    assert not running(worker)
    assert processes_of(tmp_path) == []


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_that_dies_is_reported_with_its_log(stub_python: Path, tmp_path: Path) -> None:
    port = free_port()
    ended = run_lib(
        f"start_sglang_server m {port} {tmp_path}/t.log --dies; wait_for_server http://127.0.0.1:{port} 20", stub_python
    )
    assert ended.returncode == 1
    assert f"error: the server of http://127.0.0.1:{port} ended." in ended.stderr
    assert "the weights are broken" in ended.stderr


def test_a_server_that_does_not_answer_in_time(stub_python: Path) -> None:
    ended = run_lib(f"wait_for_server http://127.0.0.1:{free_port()} 1", stub_python)
    assert ended.returncode == 1
    assert "within 1 s" in ended.stderr


def test_a_second_server_is_refused(stub_python: Path, tmp_path: Path) -> None:
    code = f"start_sglang_server m {free_port()} {tmp_path}/1.log; start_sglang_server m {free_port()} {tmp_path}/2.log"
    ended = run_lib(code, stub_python)
    assert ended.returncode == 1
    assert "is still running. Stop it first." in ended.stderr
    assert processes_of(tmp_path) == []
