"""What a run reserves on a cluster, from its flags."""

from __future__ import annotations

import pytest

from opd.cluster.placement import Seat, colocated_seats, cpus_needed, describe, groups, rank_seats
from opd.config.flags import parse_flags
from opd.config.schema import Config

SGLANG = "--rollout-engine sglang"


def config(flags: str) -> Config:
    return parse_flags(flags.split())


def reserved(flags: str, *, gpus: bool) -> dict[str, tuple[int, dict[str, float]]]:
    """Role -> (bundles, resources of each)."""
    each = config(flags).launch.ray_cpus_per_process
    return {g.role: (g.bundles, g.resources(cpus_per_process=each, on_gpus=gpus)) for g in groups(config(flags))}


def test_one_rank_reserves_one_device() -> None:
    assert reserved("", gpus=True) == {"actor": (1, {"CPU": 1.0, "GPU": 1.0})}
    assert reserved("", gpus=False) == {"actor": (1, {"CPU": 1.0})}


def test_each_role_has_a_group_of_its_own() -> None:
    flags = (
        f"--actor-num-nodes 2 --actor-num-gpus-per-node 4 {SGLANG} --rollout-num-gpus 8 --rollout-num-gpus-per-engine 2"
    )
    flags += " --critic-num-nodes 1 --critic-num-gpus-per-node 2"
    flags += " --opd-teacher-serve T --opd-teacher-num-gpus 4 --opd-teacher-num-gpus-per-engine 4"
    assert reserved(flags, gpus=True) == {
        "actor": (2, {"CPU": 4.0, "GPU": 4.0}),
        "critic": (1, {"CPU": 2.0, "GPU": 2.0}),
        "rollout": (4, {"CPU": 1.0, "GPU": 2.0}),
        "teacher": (1, {"CPU": 1.0, "GPU": 4.0}),
    }
    assert [group.spread for group in groups(config(flags))] == [True, False, False, False]
    assert cpus_needed(config(flags)) == 8 + 2 + 4 + 1
    assert describe(config(flags)) == (
        "2 x (4 training ranks), each on a machine of its own; 1 x (2 critic ranks); "
        "4 x (rollout engine of 2 devices); 1 x (teacher server of 4 devices)"
    )


def test_colocated_engines_take_cpus_and_no_further_devices() -> None:
    flags = f"--actor-num-gpus-per-node 8 {SGLANG} --colocate --rollout-num-gpus 8 --rollout-num-gpus-per-engine 2"
    assert reserved(flags, gpus=True) == {"actor": (1, {"CPU": 12.0, "GPU": 8.0})}
    assert reserved("--colocate", gpus=True) == reserved("", gpus=True)  # an engine in the rank's own process


def test_colocated_engines_share_the_devices_of_whole_neighbouring_ranks() -> None:
    flags = f"--actor-num-nodes 2 --actor-num-gpus-per-node 5 {SGLANG} --colocate --rollout-num-gpus 6"
    assert colocated_seats(config(f"{flags} --rollout-num-gpus-per-engine 2")) == [
        (Seat(bundle=0, place=0), (0, 1)),
        (Seat(bundle=0, place=1), (2, 3)),
        (Seat(bundle=1, place=0), (0, 1)),
    ]


def test_ranks_fill_one_machine_after_the_other() -> None:
    (actor,) = groups(config("--actor-num-nodes 2 --actor-num-gpus-per-node 3"))
    assert [(seat.bundle, seat.place) for seat in rank_seats(actor)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(("each", "cpus"), [("0.5", {"CPU": 1.0}), ("0", {})])
def test_processes_may_share_cpus(each: str, cpus: dict[str, float]) -> None:
    flags = f"--actor-num-gpus-per-node 2 --ray-cpus-per-process {each}"
    assert reserved(flags, gpus=False) == {"actor": (1, cpus)}
