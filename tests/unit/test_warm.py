"""A process started from the waiting one is like one of a new interpreter."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

pytestmark = pytest.mark.unit

SCRIPT = """
import json, os, sys, time
import neighbour
print(json.dumps({"argv": sys.argv[1:], "first": sys.path[0], "cwd": os.getcwd(), "name": __name__,
    "seen": os.environ.get("SEEN"), "home": "HOME" in os.environ, "torch": "torch" in sys.modules,
    "unread": sys.stdin.read(), "descriptors": len(os.listdir("/proc/self/fd")) - 1}))
print("beside", file=sys.stderr)
if "--wait" in sys.argv:
    print("waits", flush=True)
    time.sleep(60)
with open("large", "wb") as file:
    file.write(bytes(5000))
sys.exit(3)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "neighbour.py").touch()
    (tmp_path / "scripts" / "it.py").write_text(SCRIPT)
    return tmp_path / "scripts" / "it.py"


def test_it_has_what_a_new_interpreter_would_have(tmp_path: Path, script: Path) -> None:
    done = warm.run([str(script), "a", "b c"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "beside\n")
    command = [sys.executable, str(script), "a", "b c"]
    fresh = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    expected = json.loads(fresh.stdout) | {"torch": True}  # the point of it
    assert json.loads(done.stdout) == expected


def test_environment_limits_and_signals(tmp_path: Path, script: Path) -> None:
    output = tmp_path / "output"
    with output.open("w") as stream:
        options = {"cwd": tmp_path, "environment": {"SEEN": "1"}, "stdout": stream, "stderr": stream}
        limited = warm.start([str(script)], file_limit=4000, **options)
        assert limited.wait(30) == 1
        waiting = warm.start([str(script), "--wait"], **options)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.2)
        assert waiting.poll() is None
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(30) == -signal.SIGTERM == waiting.poll()
        waiting.kill()  # of one that has ended: nothing
    lines = [line for line in output.read_text().splitlines() if line.startswith("{")]
    assert [(row["seen"], row["home"]) for row in map(json.loads, lines)] == [("1", False)] * len(lines) != []
    assert "File too large" in output.read_text()


def test_a_failure_is_shown_and_a_module_can_be_run(tmp_path: Path) -> None:
    done = warm.run(["-m", "opd.report", str(tmp_path / "nowhere")], cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot read metrics file")
    (tmp_path / "fails.py").write_text("raise ValueError('told')")
    done = warm.run([str(tmp_path / "fails.py")])
    assert done.returncode == 1 and done.stderr.endswith("ValueError: told\n")
