"""SGLang servers in Ray's hands, for who asks them: the same calls as a server on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from opd.cluster.place import RolloutSeats, ServerSeat
from opd.errors import EngineError
from opd.serving.command import ServerOptions
from opd.serving.hosts import Server

logger = logging.getLogger(__name__)

CALL_SECONDS = 30.0  # for what an actor answers at once


class RayServer:
    """``Server`` held by a ``ServerWorker`` actor. Its log is on the actor's machine."""

    def __init__(self, actor: Any, options: ServerOptions, *, url: str, log_path: Path) -> None:
        self.options = options
        self.log_path = log_path
        self.url = url
        self._actor = actor

    def alive(self) -> bool:
        """False too when the actor, or its machine, is gone."""
        try:
            return ray.get(self._actor.alive.remote(), timeout=CALL_SECONDS)
        except RayActorError:
            return False
        except GetTimeoutError:
            return True  # a busy machine; a request to the server would tell

    def wait_ready(self, timeout_s: float) -> float:
        return _asked(self._actor.wait_ready.remote(timeout_s), timeout_s + CALL_SECONDS)

    def restart(self) -> None:
        _asked(self._actor.restart.remote(), CALL_SECONDS)

    def log_tail(self) -> str:
        try:
            return _asked(self._actor.log_tail.remote(), CALL_SECONDS)
        except EngineError as error:
            return str(error)

    def stop(self) -> None:
        try:
            _asked(self._actor.stop.remote(), CALL_SECONDS)
        except EngineError as error:
            logger.debug("%s", error)  # an actor that is gone has taken its server along


class RayHost:
    """``ServerHost`` over one ``ServerWorker`` actor per server.

    Args:
        actors: with their seats, by the servers' numbers.
        node_id: of the machine on which this process is.
    """

    assigns_devices = True

    def __init__(self, actors: list[tuple[Any, ServerSeat]], *, node_id: str, on_gpus: bool) -> None:
        self._actors = actors
        self.on_gpus = on_gpus
        self.shares_memory = all(seat.node_id == node_id for _, seat in actors)

    def start(self, number: int, options: ServerOptions, *, log_path: Path, port: int | None) -> Server:
        """See ``ServerHost.start``."""
        actor, seat = self._actors[number]
        path = Path(log_path).absolute()
        url = _asked(actor.start.remote(options, str(path), port, seat.host, seat.gpus), CALL_SECONDS)
        return RayServer(actor, options, url=url, log_path=path)


def joined_host(seats: RolloutSeats, *, on_gpus: bool) -> RayHost:
    """For a rank that is no Ray process itself: joins the cluster, and finds the actors by their names."""
    if not ray.is_initialized():
        ray.init(seats.address, namespace=seats.namespace, log_to_driver=False, logging_level=logging.ERROR)
    actors = [(ray.get_actor(seat.name), seat) for seat in seats.seats]
    return RayHost(actors, node_id=seats.node_id, on_gpus=on_gpus)


def _asked(reference: Any, timeout_s: float) -> Any:
    """The actor's answer.

    Raises:
        EngineError: the actor's own, or it is gone, or does not answer.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, EngineError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise EngineError(f"the Ray actor that held the SGLang server is gone ({_first_line(error)})") from error
    except GetTimeoutError as error:
        raise EngineError(f"the Ray actor of an SGLang server did not answer within {timeout_s:g} s") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
