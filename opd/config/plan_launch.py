"""What --dry-run says about who starts which processes, and where."""

from __future__ import annotations

from collections.abc import Mapping

from opd.cluster.placement import describe
from opd.config.launch_rules import ray_address, uses_ray
from opd.config.schema import Config


def launch_rows(config: Config, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """(label, text)."""
    if uses_ray(config, environ):
        address = ray_address(config, environ)
        where = "a cluster of this machine alone" if address is None else f"the cluster at {address}"
        rows = [("start with", f"python train.py: Ray places the ranks on {where}{_torchrun(config, ', or ')}")]
        rows.append(("placed", describe(config)))
    else:
        rows = [("start with", _torchrun(config, "") or "python train.py")]
    if config.uses_critic:
        own = config.critic_world_size
        rows.append(("critic", f"on {own} ranks of its own" if own else "on the training ranks, in the same layout"))
    return rows


def _torchrun(config: Config, before: str) -> str:
    nodes, per_node = config.parallel.actor_num_nodes, config.parallel.actor_num_gpus_per_node
    if config.parallel.world_size == 1 or config.critic_world_size:
        return ""
    if nodes > 1:
        return f"{before}torchrun --nnodes {nodes} --nproc-per-node {per_node} train.py, on each machine"
    return f"{before}torchrun --nproc-per-node {per_node} train.py"
