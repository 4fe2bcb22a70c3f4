"""What a CPU server's start leaves out, in a process of its own: it changes what multiprocessing and imports do."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

SCRIPT = """
import multiprocessing, os
from opd.serving import cpu_start

cpu_start.import_less()
try:
    from megatron.core import parallel_state
except ImportError:
    print("no megatron")
print(os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"])
cpu_start.fork_workers()
multiprocessing.set_start_method("spawn", force=True)  # as SGLang does
print(multiprocessing.get_start_method())
secret = object()
worker = multiprocessing.Process(target=lambda: print(type(secret).__name__, flush=True))  # cannot be pickled
worker.start()
worker.join()
"""


def test_workers_are_forked_and_a_model_package_is_named_unless_the_user_names_one() -> None:
    for named in ({}, {"SGLANG_EXTERNAL_MODEL_PACKAGE": "mine"}):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)} | named,
        )
        package = named.get("SGLANG_EXTERNAL_MODEL_PACKAGE", "opd.serving.sglang_models")
        assert done.stdout.split("\n") == ["no megatron", package, "fork", "object", ""], done.stderr
