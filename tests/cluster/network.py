"""Network namespaces as machines: each has an address of its own in a network that exists in this test alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True, kw_only=True)
class Host:
    namespace: str
    address: str

    def command(self, words: Sequence[str]) -> list[str]:
        """The same command, on this host. The process keeps its id: ``ip`` becomes the program."""
        return ["ip", "netns", "exec", self.namespace, *words]


@contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """``count`` hosts that reach each other and nobody else. The first one is the switch as well.

    Skips the test where namespaces, virtual cables or a bridge may not be made.
    """
    if shutil.which("ip") is None:
        pytest.skip("two machines are two network namespaces here, and there is no `ip` command")
    prefix = f"opd{os.getpid()}"
    hosts = [Host(namespace=f"{prefix}-{i}", address=f"10.213.77.{i + 1}") for i in range(count)]
    made: list[str] = []
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            made.append(host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        first = hosts[0]
        _ip("-n", first.namespace, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", first.namespace, "addr", "add", f"{first.address}/24", "dev", "bridge0")
        _ip("-n", first.namespace, "link", "set", "bridge0", "up")
        for i, host in enumerate(hosts[1:]):
            cable = ("link", "add", f"port{i}", "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", first.namespace, *cable)
            _ip("-n", first.namespace, "link", "set", f"port{i}", "master", "bridge0", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
        for host in hosts:  # leads nowhere, but programs that ask for their own address look at it
            device = "bridge0" if host is first else "eth0"
            _ip("-n", host.namespace, "route", "add", "default", "dev", device)
        yield hosts
    finally:
        for namespace in made:
            subprocess.run(["ip", "netns", "del", namespace], check=False)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"network namespaces cannot be made here: `ip {' '.join(words)}` said {done.stderr.strip()}")
