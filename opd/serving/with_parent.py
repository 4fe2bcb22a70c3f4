"""Runs a program that knows nothing of its parent, and ends it when that parent is gone, however it went.

    python -m opd.serving.with_parent PARENT_PID COMMAND...

Started as the leader of a process group; the group is what is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.5


def main(argv: list[str]) -> int:
    parent = int(argv[0])
    child = subprocess.Popen(argv[1:], stdin=subprocess.DEVNULL)
    while child.poll() is None:
        if os.getppid() != parent:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
