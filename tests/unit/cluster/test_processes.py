"""The environment of a rank, and ports. Whole ranks: tests/cluster."""

from __future__ import annotations

import socket

import pytest

from opd.cluster.place import ALONE
from opd.cluster.processes import ClusterError, RankOrder, free_port, rank_environment
from opd.config.flags import parse_flags
from opd.config.launch_rules import uses_ray
from opd.config.schema import Config

ORDER = RankOrder(
    config=Config(), role="actor", rank=5, world_size=8, local_rank=1, master=("10.0.0.1", 12345), folder="/",
    log_path="x.log", place=ALONE,
)  # fmt: skip


def test_a_rank_is_told_what_torchrun_would_tell_it_and_nothing_of_rays() -> None:
    base = {"RAY_JOB_ID": "1", "PATH": "/bin", "PYTHONPATH": "/mine", "OMP_NUM_THREADS": "3", "RANK": "0"}
    found = rank_environment(ORDER, base)
    assert {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")} == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345",
    }  # fmt: skip
    assert "RAY_JOB_ID" not in found
    assert (found["PATH"], found["OMP_NUM_THREADS"]) == ("/bin", "3")
    assert found["PYTHONPATH"].endswith(":/mine")
    assert rank_environment(ORDER, {})["OMP_NUM_THREADS"] == "1"


def test_a_port_can_be_taken_at_once() -> None:
    port = free_port("127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        assert taken.getsockname()[1] == port
    with pytest.raises(ClusterError, match="no free port at 203.0.113.7"):
        free_port("203.0.113.7")  # of nobody here


@pytest.mark.parametrize(
    ("flags", "environ", "answer"),
    [
        ("", {}, False),
        ("--actor-num-gpus-per-node 2", {}, True),
        ("--actor-num-nodes 2", {}, True),
        ("--actor-num-gpus-per-node 2", {"WORLD_SIZE": "2"}, False),
        ("--launcher local --actor-num-gpus-per-node 2", {"WORLD_SIZE": "2"}, False),
        ("--critic-num-nodes 1", {}, True),
        ("", {"RAY_ADDRESS": "10.0.0.1:6379"}, True),
        ("--ray-address 10.0.0.1:6379", {}, True),
        ("--ray-address 10.0.0.1:6379", {"WORLD_SIZE": "1"}, False),
        ("--launcher ray", {}, True),
        ("--launcher local", {"RAY_ADDRESS": "10.0.0.1:6379"}, False),
    ],
)
def test_who_starts_the_ranks(flags: str, environ: dict[str, str], answer: bool) -> None:
    assert uses_ray(parse_flags(flags.split()), environ) is answer
