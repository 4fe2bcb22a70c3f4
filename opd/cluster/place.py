"""What a training rank is told about the processes around it. It travels to the rank as a pickle."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerSeat:
    """A Ray actor that starts one SGLang server when it is asked to.

    Args:
        name: of the actor, in the run's Ray namespace.
        node_id: Ray's id of its machine.
        host: address on which the server listens: loopback where all who ask it are on its machine.
        gpus: ids of the devices of training ranks that it shares; None: it has reserved devices of its own.
    """

    name: str
    node_id: str
    host: str
    gpus: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutSeats:
    """The seats of all rollout engines, and how rank 0 reaches them.

    Args:
        address, namespace: of the Ray cluster and of the run in it.
        node_id: of rank 0's machine.
    """

    address: str
    namespace: str
    node_id: str
    seats: tuple[ServerSeat, ...]


@dataclass(frozen=True, kw_only=True)
class CriticLink:
    """Where the critic's own ranks take requests, and the secret that both sides prove to know."""

    host: str
    port: int
    secret: bytes


@dataclass(frozen=True, kw_only=True)
class Place:
    """
    Args:
        rollout: where SGLang rollout servers are started; None: on this machine, by rank 0.
        teacher_url: address of the servers that were started for --opd-teacher-serve; None: there are none yet.
        critic: None: the critic, if there is one, shares the training ranks.
    """

    rollout: RolloutSeats | None = None
    teacher_url: str | None = None
    critic: CriticLink | None = None


ALONE = Place()
