"""Which network interface gloo is told to use."""

from __future__ import annotations

import os

import pytest

from opd.cluster.interfaces import interface_of, tell_gloo

pytestmark = pytest.mark.unit


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None


@pytest.mark.parametrize(
    ("master", "ranks_here", "given", "told"),
    [
        ("127.0.0.1", "2", None, "lo"),
        ("127.0.0.1", "1", None, None),  # other machines cannot reach it: gloo chooses
        ("127.0.0.1", "2", "eth7", "eth7"),
        ("no.such.host.invalid", "1", None, None),
    ],
)
def test_gloo_is_told_the_interface_towards_rank_0(
    monkeypatch: pytest.MonkeyPatch, master: str, ranks_here: str, given: str | None, told: str | None
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")
    if given is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    tell_gloo(master)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == told
