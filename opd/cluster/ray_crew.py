"""The actors of one run: created in their seats, given their orders, watched, stopped."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from opd.cluster.failures import EndedRank
from opd.cluster.place import CriticLink, Place, RolloutSeats, ServerSeat
from opd.cluster.placement import Seat, colocated_seats, groups, rank_seats
from opd.cluster.processes import ClusterError, End, RankOrder
from opd.cluster.ray_servers import RayHost
from opd.cluster.ray_settings import LOOPBACK
from opd.cluster.ray_workers import THREADS, Node, RankWorker, ServerWorker
from opd.config.schema import Config
from opd.errors import UserError

START_SECONDS = 600.0  # for an actor to come up: it imports ray, and torch, from a disk that many may share
STOP_SECONDS = 30.0
OBSERVE_SECONDS = 20.0
# Variables of the run's driver that its ranks and servers get too, beside those of their own node.
_CARRIED = ("OMP_", "MKL_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH", "NCCL_", "GLOO_", "CUDA_DEVICE_MAX_")
_CARRIED += ("SGLANG_", "WANDB_", "PYTHONPATH")


@dataclass(kw_only=True)
class Rank:
    """One rank as the driver sees it."""

    order: RankOrder
    worker: Any
    node: Node
    read: int | None  # bytes of its log that were relayed; None: it is not
    ended: EndedRank | None = field(default=None)


class Crew:
    """
    Args:
        reservations: a placement group for each role.
        namespace: of the run, in which the servers' actors have names.
    """

    def __init__(self, config: Config, reservations: dict[str, PlacementGroup], *, namespace: str, gpus: bool) -> None:
        self._config = config
        self._reservations = reservations
        self._namespace = namespace
        self._gpus = gpus
        self._groups = {group.role: group for group in groups(config)}
        self._workers: list[Any] = []
        self._actor_workers: list[Any] = []
        self._critic_workers: list[Any] = []
        self._actor_nodes: list[Node] = []
        self._critic_nodes: list[Node] = []
        self._rollout_seats: list[ServerSeat] = []
        self.ranks: list[Rank] = []

    def seat(self) -> None:
        """Creates all actors that are to hold ranks and rollout servers, and finds out where they are.

        Raises:
            ClusterError: an actor did not come up.
        """
        self._actor_workers = self._rank_workers("actor")
        self._critic_workers = self._rank_workers("critic") if "critic" in self._groups else []
        rollout = self._rollout_workers()
        self._actor_nodes = _answers([worker.node.remote() for worker in self._actor_workers])
        self._critic_nodes = _answers([worker.node.remote() for worker in self._critic_workers])
        self._rollout_seats = self._seats("rollout", rollout)

    def teacher_host(self) -> RayHost:
        """For the servers of --opd-teacher-serve. After ``seat``."""
        group = self._groups["teacher"]
        workers = [
            (self._worker(ServerWorker, "teacher", Seat(bundle=number, place=0), group.devices), None)
            for number in range(group.bundles)
        ]
        seats = self._seats("teacher", workers)
        actors = [(worker, seat) for (worker, _), seat in zip(workers, seats, strict=True)]
        return RayHost(actors, node_id=self._actor_nodes[0].node_id, on_gpus=self._gpus)

    def start(self, teacher_url: str | None) -> None:
        """Starts all ranks.

        Raises:
            ClusterError: one could not be started.
        """
        config, link = self._config, None
        if self._critic_workers:
            host = self._critic_nodes[0].address
            port = _answer(self._critic_workers[0].free_port.remote())
            link = CriticLink(host=host, port=port, secret=secrets.token_bytes(32))
        rollout = None
        if self._rollout_seats:
            rollout = RolloutSeats(
                address=ray.get_runtime_context().gcs_address,
                namespace=self._namespace,
                node_id=self._actor_nodes[0].node_id,
                seats=tuple(self._rollout_seats),
            )
        place = Place(rollout=rollout, teacher_url=teacher_url, critic=link)
        self._add_ranks("actor", config, self._actor_workers, self._actor_nodes, place)
        if self._critic_workers:
            nodes, per_node = config.critic.critic_num_nodes or 1, config.critic.critic_num_gpus_per_node or 1
            parallel = replace(config.parallel, actor_num_nodes=nodes, actor_num_gpus_per_node=per_node)
            self._add_ranks(
                "critic", replace(config, parallel=parallel), self._critic_workers, self._critic_nodes, place
            )
        environment = _carried_environment(config)
        _answers([rank.worker.start.remote(rank.order, environment) for rank in self.ranks])

    def watch(self, relay: Callable[[bytes], None], each_time: Callable[[], bool]) -> None:
        """Relays rank 0's output until every rank has ended or ``each_time``, called twice a second, says to stop."""
        pending = {self._observe(rank): rank for rank in self.ranks if rank.ended is None}
        while pending and not each_time():
            done, _ = ray.wait(list(pending), num_returns=1, timeout=0.5)
            for reference in done:
                rank = pending.pop(reference)
                self._take(rank, reference, relay)
                if rank.ended is None:
                    pending[self._observe(rank)] = rank

    def signal(self, number: int) -> None:
        """To every training rank that runs; the critic's end when those let it go."""
        running = [rank for rank in self.ranks if rank.ended is None and rank.order.role == "actor"]
        ray.wait([rank.worker.signal.remote(number) for rank in running], num_returns=len(running), timeout=5.0)

    def ended(self) -> list[EndedRank]:
        return [rank.ended for rank in self.ranks if rank.ended is not None]

    def stop(self) -> None:
        """Ends all that runs, and the actors. Safe to call twice."""
        workers, self._workers = self._workers, []
        stopping = [worker.stop.remote() for worker in workers]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=STOP_SECONDS)
        for worker in workers:
            ray.kill(worker)

    def _observe(self, rank: Rank) -> Any:
        return rank.worker.observe.remote(rank.read, OBSERVE_SECONDS)

    def _take(self, rank: Rank, reference: Any, relay: Callable[[bytes], None]) -> None:
        end: End | None = None
        lost = ""
        try:
            seen = ray.get(reference)
        except RayActorError as error:
            lost = f"Ray's worker there has ended ({_first_line(error)})"
        else:
            if rank.read is not None:
                rank.read += len(seen.text)
                relay(seen.text)
            if seen.end is None:
                return
            end = seen.end
        rank.ended = EndedRank(order=rank.order, node=rank.node.shown, end=end, lost=lost)

    def _rank_workers(self, role: str) -> list[Any]:
        return [self._worker(RankWorker, role, seat, 1) for seat in rank_seats(self._groups[role])]

    def _rollout_workers(self) -> list[tuple[Any, tuple[int, ...] | None]]:
        """With the training ranks, by their places in the bundle, whose devices a server shares."""
        config = self._config
        if "rollout" in self._groups:
            group = self._groups["rollout"]
            return [
                (self._worker(ServerWorker, "rollout", Seat(bundle=number, place=0), group.devices, number), None)
                for number in range(group.bundles)
            ]
        if not self._groups["actor"].guests:
            return []
        return [
            (self._worker(ServerWorker, "actor", seat, 0, number), places)
            for number, (seat, places) in enumerate(colocated_seats(config))
        ]

    def _seats(self, role: str, workers: list[tuple[Any, tuple[int, ...] | None]]) -> list[ServerSeat]:
        nodes: list[Node] = _answers([worker.node.remote() for worker, _ in workers])
        seats = []
        for number, (node, (_, places)) in enumerate(zip(nodes, workers, strict=True)):
            ranks = [other for other in self._actor_nodes if other.node_id == node.node_id]
            shared = None if places is None or not self._gpus else tuple(ranks[place].gpus[0] for place in places)
            near = node.node_id == self._actor_nodes[0].node_id
            seats.append(
                ServerSeat(
                    name=_server_name(role, number),
                    node_id=node.node_id,
                    host=LOOPBACK if near else node.address,
                    gpus=shared,
                )
            )
        return seats

    def _worker(self, kind: type, role: str, seat: Seat, devices: int, number: int | None = None) -> Any:
        """An actor in its seat. ``number``: of a server, which others find by its name."""
        options: dict[str, Any] = {
            "num_cpus": self._config.launch.ray_cpus_per_process,
            "num_gpus": devices if self._gpus else 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": THREADS,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._reservations[role], placement_group_bundle_index=seat.bundle
            ),
        }
        if number is not None:
            options |= {"name": _server_name("rollout", number), "namespace": self._namespace}
        arguments = (_carried_environment(self._config),) if kind is ServerWorker else ()
        self._workers.append(ray.remote(kind).options(**options).remote(*arguments))
        return self._workers[-1]

    def _add_ranks(self, role: str, config: Config, workers: list[Any], nodes: list[Node], place: Place) -> None:
        master = (nodes[0].address, _answer(workers[0].free_port.remote()))
        folder = Path(config.output.output_dir or f"opd-{self._namespace}").absolute() / "ranks"
        seats = rank_seats(self._groups[role])
        for number, (seat, worker, node) in enumerate(zip(seats, workers, nodes, strict=True)):
            order = RankOrder(
                config=config,
                role=role,
                rank=number,
                world_size=len(workers),
                local_rank=seat.place,
                master=master,
                folder=os.getcwd(),
                log_path=str(folder / f"{role}_{number}.log"),
                place=place,
            )
            leader = role == "actor" and number == 0
            self.ranks.append(Rank(order=order, worker=worker, node=node, read=0 if leader else None))


def _server_name(role: str, number: int) -> str:
    return f"{role}_server_{number}"


def _carried_environment(config: Config) -> dict[str, str]:
    named = config.opd.opd_teacher_api_key_env
    return {name: value for name, value in os.environ.items() if name.startswith(_CARRIED) or name == named}


def _answer(reference: Any) -> Any:
    return _answers([reference])[0]


def _answers(references: Iterable[Any]) -> list[Any]:
    """
    Raises:
        ClusterError: an actor did not come up, or could not do it.
    """
    deadline = time.monotonic() + START_SECONDS
    try:
        return ray.get(list(references), timeout=max(1.0, deadline - time.monotonic()))
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise ClusterError(f"a process could not be started: {error.cause}") from error
    except RayActorError as error:
        raise ClusterError(
            f"a Ray worker of this run ended at its start: {_first_line(error)}. Is the same `opd` installed, and the "
            "same folder there, on every node?"
        ) from error
    except GetTimeoutError as error:
        raise ClusterError(f"a Ray worker of this run did not come up within {START_SECONDS:g} s") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
