"""The critic as the training ranks see it when it has ranks of its own: batches go there, values come back."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from typing import Any

import torch.distributed as dist

from opd.cluster.batch_shares import for_critic, gathered
from opd.cluster.place import CriticLink
from opd.cluster.processes import ClusterError
from opd.errors import UserError
from opd.types import TokenBatch

CONNECT_POLL_SECONDS = 0.2


class RemoteCritic:
    """``Critic``; every method is called by all training ranks together, and rank 0 speaks for them.

    Args:
        link: where the critic's rank 0 listens.
        group: data-parallel group of this training rank, without context parallelism.
        resumed_step: of the student; the critic loads its own checkpoint of it.
        timeout_s: for the first answer of the critic's rank 0.

    Raises:
        ClusterError: it does not answer.
        CheckpointError: see ``build_critic``.
    """

    def __init__(
        self, link: CriticLink, *, group: dist.ProcessGroup, resumed_step: int | None, timeout_s: float
    ) -> None:
        self._link = link
        self._group = group
        self._connection = _connect(link, timeout_s) if dist.get_rank() == 0 else None
        self._ask("build", resumed_step)

    def forward_values(self, batch: TokenBatch) -> TokenBatch:
        """See ``Critic.forward_values``."""
        values = self._ask("forward_values", gathered(for_critic(batch), self._group))
        return batch.with_(values_T=values.select(batch))

    def start_update(self, batch: TokenBatch) -> Callable[[], dict[str, float]]:
        """See ``Critic.start_update``: the critic's ranks work while this one goes on."""
        self._send("update", gathered(for_critic(batch), self._group))
        return self._answer

    def save(self, iteration: int) -> None:
        """Raises:
        CheckpointError: see ``MegatronCritic.save``.
        """
        self._ask("save", iteration)

    def close(self) -> None:
        """Lets the critic's ranks go. Safe to call twice, or when they are gone."""
        if self._connection is None:
            return
        connection, self._connection = self._connection, None
        try:
            send(connection, ("close", None))
        except OSError:
            pass  # they are gone already
        connection.close()

    def _ask(self, what: str, argument: Any) -> Any:
        self._send(what, argument)
        return self._answer()

    def _send(self, what: str, argument: Any) -> None:
        if self._connection is not None:
            with _told_when_lost(self._link):
                send(self._connection, (what, argument))

    def _answer(self) -> Any:
        """The critic's, on all ranks; an error of it is raised on all of them."""
        from opd.megatron_backend.over_ranks import from_first_rank

        answer = None
        if self._connection is not None:
            with _told_when_lost(self._link):
                answer = receive(self._connection)
        answer = from_first_rank(answer)
        if isinstance(answer, UserError):
            raise answer
        return answer


@contextmanager
def _told_when_lost(link: CriticLink) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise ClusterError(
            f"the connection to the critic's ranks at {link.host}:{link.port} broke ({type(error).__name__}): one of"
            " them has ended"
        ) from error


def send(connection: Connection, message: Any) -> None:
    """By plain pickle: ``Connection.send`` would have torch put tensors into this machine's shared memory."""
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """Raises:
    EOFError, OSError: the other side is gone.
    """
    return pickle.loads(connection.recv_bytes())


def _connect(link: CriticLink, timeout_s: float) -> Connection:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return Client((link.host, link.port), authkey=link.secret)
        except (OSError, EOFError, AuthenticationError) as error:  # it is still importing its packages
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the critic's rank 0 does not answer at {link.host}:{link.port} after {timeout_s:g} s ({error})"
                ) from error
        time.sleep(CONNECT_POLL_SECONDS)
