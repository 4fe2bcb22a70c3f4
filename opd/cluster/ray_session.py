"""Ray itself: joining a cluster, or a cluster of this machine for the time of the run; reserving what a run needs."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from opd.cluster.placement import Group, cpus_needed, groups
from opd.cluster.processes import ClusterError
from opd.cluster.ray_settings import LOOPBACK
from opd.config.schema import Config

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 << 20  # batches and weights do not pass through Ray; its least is 75 MiB
POLL_SECONDS = 0.1


@contextmanager
def ray_session(config: Config, address: str | None) -> Iterator[str]:
    """Joins the cluster at ``address``; without one, starts and stops one on loopback. Gives the run's namespace.

    Raises:
        ClusterError: no cluster there.
    """
    namespace = f"opd-{secrets.token_hex(4)}"
    quiet = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(
                "local",  # never the cluster that somebody else may have left on this machine
                num_cpus=max(1, math.ceil(cpus_needed(config))),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address=LOOPBACK,
                **quiet,
            )
        else:
            ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where, said = "on this machine" if address is None else f"at {address}", _first_line(error).rstrip(".")
        raise ClusterError(
            f"Ray could not be started {where}: {said}. On a node of a running cluster give its head's HOST:PORT with "
            "`--ray-address`; scripts/lib/ray.sh starts one"
        ) from error
    try:
        yield namespace
    finally:
        ray.shutdown()


def has_gpus() -> bool:
    return ray.cluster_resources().get("GPU", 0) > 0


@contextmanager
def reserved(config: Config, *, on_gpus: bool, own: bool) -> Iterator[dict[str, PlacementGroup]]:
    """The placement group of each role, all of them ready.

    Args:
        own: the cluster is this run's alone: nobody will join it, or leave it.

    Raises:
        ClusterError: the cluster does not have that much, or not within --ray-timeout.
    """
    found: dict[str, PlacementGroup] = {}
    deadline = time.monotonic() + (0.0 if own else config.launch.ray_timeout)
    each = config.launch.ray_cpus_per_process
    try:
        for group in groups(config):
            bundles = [group.resources(cpus_per_process=each, on_gpus=on_gpus)] * group.bundles
            if not bundles[0]:
                bundles = [{"CPU": 0.001}] * group.bundles  # Ray wants something to reserve
            _check_size(bundles[0], group, wait=not own, deadline=deadline)
            strategy = "STRICT_SPREAD" if group.spread else "PACK"
            found[group.role] = placement_group(bundles, strategy=strategy, name="")
            _wait(found[group.role], group, bundles[0], deadline)
        yield found
    finally:
        for reservation in found.values():
            remove_placement_group(reservation)


def _wait(reservation: PlacementGroup, group: Group, bundle: dict[str, float], deadline: float) -> None:
    patience = max(5.0, deadline - time.monotonic())
    if not reservation.wait(patience):
        raise ClusterError(_too_little(group, bundle))


def _check_size(bundle: dict[str, float], group: Group, *, wait: bool, deadline: float) -> None:
    """Whether enough nodes are large enough for the bundles, if all of them were free."""
    needed = group.bundles if group.spread else 1
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        large = sum(all(node.get(name, 0) >= number for name, number in bundle.items()) for node in nodes)
        if large >= needed:
            return
        if not wait or time.monotonic() > deadline:
            raise ClusterError(_too_little(group, bundle))
        time.sleep(POLL_SECONDS)


def _too_little(group: Group, bundle: dict[str, float]) -> str:
    per_bundle = ", ".join(f"{number:g} {name}" for name, number in bundle.items())
    apart = " on machines of their own" if group.spread else ""
    nodes = [
        f"{node['NodeManagerAddress']} has "
        + ", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        for node in ray.nodes()
        if node["Alive"]
    ]
    free = ", ".join(f"{ray.available_resources().get(name, 0):g} {name}" for name in bundle)
    flags = {
        "actor": "--actor-num-nodes, --actor-num-gpus-per-node",
        "critic": "--critic-num-nodes, --critic-num-gpus-per-node",
        "rollout": "--rollout-num-gpus, --rollout-num-gpus-per-engine",
        "teacher": "--opd-teacher-num-gpus, --opd-teacher-num-gpus-per-engine",
    }
    return (
        f"the Ray cluster cannot hold the {group.role}: {group.bundles} x ({per_bundle}){apart} ({flags[group.role]}). "
        f"{'; '.join(nodes)}; free in all: {free}. Start more nodes, lower these flags or --ray-cpus-per-process, or "
        "wait longer with --ray-timeout"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
