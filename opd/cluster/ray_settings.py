"""What Ray reads from the environment at its import. Call ``set_up_ray`` before anything imports ray."""

from __future__ import annotations

import os
from pathlib import Path

LOOPBACK = "127.0.0.1"


def set_up_ray(*, loopback: bool) -> None:
    """
    Args:
        loopback: for a cluster of this machine alone. Its processes then listen where nobody else can reach them;
            without this Ray takes the machine's outer address, and listens on every network.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports nothing to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # an actor without a GPU may share others'
    if "RAY_AUTH_MODE" not in os.environ and _has_token():  # as scripts/lib/ray.sh starts clusters
        os.environ["RAY_AUTH_MODE"] = "token"
    if loopback:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's own switch for "127.0.0.1 is my address"


def _has_token() -> bool:
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(given) or (Path.home() / ".ray" / "auth_token").is_file()


def is_loopback(address: str) -> bool:
    """Of a cluster, HOST:PORT."""
    return address.startswith(f"{LOOPBACK}:")
