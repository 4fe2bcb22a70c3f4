"""The program of one rank that Ray has placed: ``python -m opd.cluster.rank_main ORDER PARENT_PID``.

It runs the code that ``train.py`` runs under torchrun, and writes down how that ended.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

from opd.cluster.local import run_rank
from opd.cluster.processes import RankOrder, Report
from opd.config.flags import ConfigError
from opd.errors import UserError
from opd.preemption import Preempted, StopRequest

PARENT_POLL_SECONDS = 0.5


def main(order_path: str, parent: int) -> int:
    """Exit status: as ``train.py``'s."""
    _listen_again()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    path = Path(order_path)
    order, report_path = pickle.loads(path.read_bytes())
    path.unlink()
    os.chdir(order.folder)
    if order.rank != 0 or order.role != "actor":  # the first training rank's reporter shows its own
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
        logging.getLogger("opd").setLevel(logging.INFO)

    def report(outcome: str, message: str = "") -> None:
        Report(outcome=outcome, message=" ".join(message.split()), at=time.time()).write(Path(report_path))

    try:
        _run(order)
    except UserError as error:
        report("refused", str(error))
        return 2 if isinstance(error, ConfigError) else 1
    except Preempted:
        report("preempted")
        return 0
    except KeyboardInterrupt:
        report("interrupted")
        return 130
    except BaseException as error:
        report("crashed", f"{type(error).__name__}: {error}")
        raise
    report("done")
    return 0


def _run(order: RankOrder) -> None:
    if order.role == "critic":
        from opd.cluster.critic_world import serve_critic

        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends when the training ranks let it go
        serve_critic(order.config, order.place.critic)
        return
    stop = StopRequest(alone=order.world_size == 1)
    stop.listen()
    run_rank(order.config, stop, order.place)


def _listen_again() -> None:
    """A child of a Ray worker's thread inherits what that thread does not listen to."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def _end_with_parent(parent: int) -> None:
    """The leader of a process group of its own ends all of it when its parent is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
