"""Flags -> what a run reserves on a cluster: groups of bundles, each bundle whole on one machine. Knows no Ray."""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Group:
    """Bundles of the same size, reserved together.

    Args:
        role: "actor", "critic", "rollout" or "teacher".
        bundles: how many.
        processes: that live in one bundle and have reserved devices there.
        devices: of one such process: GPUs, or nothing where the cluster has none.
        guests: further processes in each bundle, which share its devices.
        spread: every bundle on a machine of its own.
    """

    role: str
    bundles: int
    processes: int
    devices: int = 1
    guests: int = 0
    spread: bool = False

    def resources(self, *, cpus_per_process: float, on_gpus: bool) -> dict[str, float]:
        """Of one bundle, by Ray's names."""
        cpus = cpus_per_process * (self.processes + self.guests)
        wanted = {"CPU": cpus, "GPU": float(self.processes * self.devices if on_gpus else 0)}
        return {name: number for name, number in wanted.items() if number > 0}


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One process: which bundle of its group, and which of the bundle's processes (or guests) it is."""

    bundle: int
    place: int


def groups(config: Config) -> list[Group]:
    """In the order in which they are reserved; the first is the training ranks'."""
    parallel, rollout, critic, opd = config.parallel, config.rollout, config.critic, config.opd
    served = rollout.rollout_engine == "sglang"
    found = [
        Group(
            role="actor",
            bundles=parallel.actor_num_nodes,
            processes=parallel.actor_num_gpus_per_node,
            guests=engines_per_node(config) if served and config.launch.colocate else 0,
            spread=parallel.actor_num_nodes > 1,
        )
    ]
    if config.critic_world_size:
        nodes = critic.critic_num_nodes or 1
        found.append(
            Group(role="critic", bundles=nodes, processes=critic.critic_num_gpus_per_node or 1, spread=nodes > 1)
        )
    if served and not config.launch.colocate:
        size = rollout.rollout_num_gpus_per_engine
        found.append(Group(role="rollout", bundles=rollout.rollout_num_gpus // size, processes=1, devices=size))
    if opd.opd_teacher_serve is not None:
        size = opd.opd_teacher_num_gpus_per_engine
        found.append(Group(role="teacher", bundles=opd.opd_teacher_num_gpus // size, processes=1, devices=size))
    return found


def rank_seats(group: Group) -> list[Seat]:
    """Of each rank, in order: the ranks of one machine follow each other, as Megatron's layouts want it."""
    return [Seat(bundle=bundle, place=place) for bundle in range(group.bundles) for place in range(group.processes)]


def colocated_seats(config: Config) -> list[tuple[Seat, tuple[int, ...]]]:
    """Of each rollout engine that shares the training ranks' devices: its seat as a guest of the actor's group, and the
    places of the ranks in that bundle whose devices it takes."""
    size, per_node = config.rollout.rollout_num_gpus_per_engine, engines_per_node(config)
    found = []
    for number in range(config.rollout.rollout_num_gpus // size):
        bundle, place = divmod(number, per_node)
        found.append((Seat(bundle=bundle, place=place), tuple(range(place * size, (place + 1) * size))))
    return found


def engines_per_node(config: Config) -> int:
    return config.parallel.actor_num_gpus_per_node // config.rollout.rollout_num_gpus_per_engine


def cpus_needed(config: Config) -> float:
    """CPUs, as Ray counts them, of all groups together."""
    each = config.launch.ray_cpus_per_process
    found = groups(config)
    return sum(g.bundles * g.resources(cpus_per_process=each, on_gpus=False).get("CPU", 0.0) for g in found)


def describe(config: Config) -> str:
    """One line, for the plan: ``1 x (4 training ranks); 4 x (rollout engine of 2 devices)``."""
    names = {
        "critic": "critic rank",
        "actor": "training rank",
        "rollout": "rollout engine",
        "teacher": "teacher server",
    }
    parts = []
    for group in groups(config):
        ranks = group.role in ("actor", "critic")
        count = f"{group.processes} " if ranks else ""
        plural = "s" if ranks and group.processes > 1 else ""
        size = f" of {group.devices} devices" if group.devices > 1 else ""
        sharing = f" and {group.guests} rollout engines on the same devices" if group.guests else ""
        apart = ", each on a machine of its own" if group.spread else ""
        parts.append(f"{group.bundles} x ({count}{names[group.role]}{plural}{size}{sharing}){apart}")
    return "; ".join(parts)
