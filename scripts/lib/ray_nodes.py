"""Prints how many nodes of a Ray cluster are alive: ``python scripts/lib/ray_nodes.py HOST:PORT``, on one of them."""

from __future__ import annotations

import logging
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd.cluster.ray_settings import is_loopback, set_up_ray  # noqa: E402

ANSWER_SECONDS = 3.0

host, _, port = sys.argv[1].rpartition(":")
try:
    socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
except OSError:  # ray.init would wait for it, and this is asked again
    print(0)
    sys.exit()

set_up_ray(loopback=is_loopback(sys.argv[1]))
import ray  # noqa: E402

ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
print(sum(node["Alive"] for node in ray.nodes()))
