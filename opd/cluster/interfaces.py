"""The network interface over which ranks meet: gloo would take the one that the machine's name leads to."""

from __future__ import annotations

import os
import socket

import psutil


def interface_of(address: str) -> str | None:
    """Name of the network interface with ``address``; None: it is none of ours."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            return name
    return None


def tell_gloo(master: str) -> None:
    """Has gloo use the interface that leads to rank 0's machine, unless GLOO_SOCKET_IFNAME says which.

    On rank 0's own machine its name may stand for a loopback address, which the other machines cannot reach: the choice
    is left to gloo there.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    own = _address_towards(master)
    ranks = os.environ.get("WORLD_SIZE", "1")
    alone = os.environ.get("LOCAL_WORLD_SIZE", ranks) == ranks
    if own is None or (own.startswith("127.") and not alone):
        return
    interface = interface_of(own)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def _address_towards(host: str) -> str | None:
    """This machine's address on the way to ``host``. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return probe.getsockname()[0]
    except OSError:
        return None
