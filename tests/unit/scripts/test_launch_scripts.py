"""Launch scripts: bash parses them; their plans, without weights; a server's start, wait and stop; Ray jobs."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "on_policy_distillation"
LIB = ROOT / "scripts" / "lib" / "launch.sh"
SCRIPTS = sorted([*(ROOT / "examples").rglob("*.sh"), *(ROOT / "scripts").rglob("*.sh"), ROOT / ".ci" / "run"])

FACTS = ROOT / "scripts" / "models" / "facts"
# What each script's plan must say of its own; a script without a line here fails the test below.
PLANS = {
    "run-qwen3-8B-opd.sh": (
        "server at http://127.0.0.1:13141/generate",
        "4 ranks: tensor 2 x pipeline 1 x context 1 x data 2",
    ),
    "run-qwen3-8B-opd-megatron.sh": ("checkpoint release: 32,762,123,264 parameters, bf16", "4 ranks: tensor 4"),
    "run-qwen3-8B-gkd.sh": ("gkd (beta 0.5) over the whole vocabulary", "14,768,307,200 parameters, bf16"),
    "run-qwen3-8B-several-teachers.sh": (
        "by metadata field `teacher` (math x 1, code x 0.5)",
        "teacher code co-loaded",
    ),
    "run-qwen3-1.7B-mixture.sh": ("1,720,574,976 parameters, bf16", "kl_symmetry"),
    "run-qwen3-8B-opd-multinode.sh": (
        "8 ranks: tensor 2 x pipeline 1 x context 1 x data 4",
        "1 x (teacher server of 4 devices)",
    ),
    "run-qwen3-30B-A3B-opd.sh": (
        "30,532,122,624 parameters, bf16: qwen3_moe",
        "2 x (8 training ranks), each on a machine of its own",
    ),
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


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_no_error() -> None:
    ended = subprocess.run(["shellcheck", "-x", "-S", "error", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the scripts expect under $BASE: configs, data, and no weights."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Qwen3-30B-A3B"):
        config = json.loads((FACTS / f"qwen3-{name.removeprefix('Qwen3-')}.json").read_text(encoding="utf-8"))["config"]
        for model in (name, f"{name}_torch_dist/hf"):
            (folder / model).mkdir(parents=True)
            (folder / model / "config.json").write_text(json.dumps(config))
        (folder / f"{name}_torch_dist" / "latest_checkpointed_iteration.txt").write_text("release")
    shutil.copytree(folder / "Qwen3-14B", folder / "Qwen3-14B-code")
    shutil.copytree(folder / "Qwen3-30B-A3B", folder / "Qwen3-235B-A22B")  # served: only its folder is looked at
    (folder / "dapo-math-17k").mkdir()
    for name in ("dapo-math-17k/dapo-math-17k.jsonl", "math_and_code.jsonl"):
        (folder / name).write_text('{"prompt": "1 + 1 =", "label": "2", "metadata": {"teacher": "code"}}\n')
    return folder


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


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("run-qwen3-*.sh")))
def test_the_plan_of_a_script_for_gpus(base: Path, script: str) -> None:
    ended = dry_run(script, base)
    assert ended.returncode == 0, ended.stderr
    text = " ".join(ended.stdout.split())
    for part in PLANS[script]:
        assert part in text
    assert "Memory of the heaviest training rank" in text
    peak = float(re.search(r" peak ([0-9.]+) GiB", text)[1])
    row = next(
        line for line in (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines() if f"`{script}`" in line
    )
    assert float(re.search(r"\| (\d+) GiB \|$", row)[1]) == pytest.approx(peak, rel=0.1)
    assert "DOES NOT FIT" not in text
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


def test_a_port_in_use_is_refused(stub_python: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run_lib(f"wait_for_free_port {port} 1; echo free", stub_python)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert f"port {port} is in use. End the program that listens there" in ended.stderr
    assert run_lib(f"wait_for_free_port {port} 1; echo free", stub_python).stdout == "free\n"


def test_a_teacher_that_runs_already_is_not_started_again(stub_python: Path, tmp_path: Path) -> None:
    code = f"RUN={tmp_path}; TEACHER_URL=http://elsewhere:1; serve_teacher model 0; echo $TEACHER_URL"
    ended = run_lib(code, stub_python)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "http://elsewhere:1\n", "")
    assert processes_of(tmp_path) == []


def test_a_teacher_is_served_on_the_devices_given_and_ends_with_the_script(stub_python: Path, tmp_path: Path) -> None:
    code = f"RUN={tmp_path}; TEACHER_PORT={free_port()}; serve_teacher model 6,7 --tp-size 2; "
    code += 'echo "$TEACHER_URL"; tr "\\0" "\\n" <"/proc/$SGLANG_SERVER_PID/environ" | grep ^CUDA'
    ended = run_lib(code, stub_python)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[1] == "CUDA_VISIBLE_DEVICES=6,7"
    assert processes_of(tmp_path) == []


def test_a_job_runs_train_py_in_this_folder_with_every_flag_as_given(stub_python: Path, tmp_path: Path) -> None:
    ray = tmp_path / "ray"  # runs what follows the `--` somewhere else, as the cluster's job server does
    ray.write_text('#!/bin/bash\necho "${@:1:4}"; while [[ $1 != -- ]]; do shift; done; shift; cd / && exec "$@"\n')
    ray.chmod(0o755)
    code = f'cd "{ROOT}"; PATH="{tmp_path}:$PATH"; submit_training --prompt-data "a b.jsonl" --no-such-flag'
    ended = run_lib(code, stub_python)
    assert ended.stdout == "job submit --address http://127.0.0.1:8265\n"
    assert ended.stderr == "error: unknown flag `--no-such-flag`. `train.py --help all` lists every flag.\n"
