"""The critic's own ranks: a world beside that of the training ranks, which serves their rank 0."""

from __future__ import annotations

import logging
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from opd.cluster.batch_shares import Values, gathered
from opd.cluster.place import CriticLink
from opd.cluster.processes import ClusterError
from opd.cluster.remote_critic import receive, send
from opd.config.schema import Config
from opd.data.batching import rank_share
from opd.errors import UserError
from opd.types import TokenBatch

if TYPE_CHECKING:
    from opd.megatron_backend.critic import MegatronCritic

logger = logging.getLogger(__name__)

Request = tuple[str, Any]


def serve_critic(config: Config, link: CriticLink) -> None:
    """Returns when the training ranks let the critic go. RANK and WORLD_SIZE are of the critic's world.

    Args:
        config: with the critic's ranks in the place of the training ranks.

    Raises:
        ClusterError: the training ranks are gone.
    """
    from opd.megatron_backend import device, groups

    rank_device = device.install()
    from opd.megatron_backend.build import join_world

    join_world(config, rank_device)
    requests = _Requests(link) if dist.get_rank() == 0 else None
    critic = _Served(config)
    try:
        while True:
            name, argument = _shared(requests.next() if requests is not None else None)
            if name == "close":
                return
            answer = critic.answer(name, argument)
            if requests is not None:
                requests.reply(answer)
    finally:
        groups.shutdown()


class _Served:
    """Does what is asked, on every rank of the critic's world."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._critic: MegatronCritic | None = None

    def answer(self, name: str, argument: Any) -> Any:
        """What rank 0 sends back; an error for the person at the terminal is an answer too."""
        try:
            return getattr(self, f"_{name}")(argument)
        except UserError as error:
            return error

    def _build(self, resumed_step: int | None) -> None:
        from opd.megatron_backend.build import build_critic

        self._critic = build_critic(self._config, resumed_step=resumed_step)

    def _forward_values(self, batch: TokenBatch) -> Values | None:
        from megatron.core import parallel_state as mpu

        share = self._critic.forward_values(_share(batch))
        whole = gathered(share.with_(values_T=share.values_T.detach().cpu()), mpu.get_data_parallel_group())
        return None if whole is None else Values.of(whole)

    def _update(self, batch: TokenBatch) -> dict[str, float]:
        return self._critic.start_update(_share(batch))()

    def _save(self, iteration: int) -> None:
        self._critic.save(iteration)


def _share(batch: TokenBatch) -> TokenBatch:
    from megatron.core import parallel_state as mpu

    return rank_share(batch, rank=mpu.get_data_parallel_rank(), size=mpu.get_data_parallel_world_size())


def _shared(request: Request | None) -> Request:
    """Rank 0's request on all ranks."""
    from opd.megatron_backend.over_ranks import from_first_rank

    return from_first_rank(request)


class _Requests:
    """Of the training ranks' rank 0."""

    def __init__(self, link: CriticLink) -> None:
        self._listener = Listener((link.host, link.port), authkey=link.secret)
        self._connection: Connection | None = None

    def next(self) -> Request:
        """Raises:
        ClusterError: the training ranks are gone.
        """
        while self._connection is None:
            try:
                self._connection = self._listener.accept()
            except (OSError, EOFError, AuthenticationError) as error:
                logger.warning("a connection to the critic was refused: %s", type(error).__name__)
        try:
            return receive(self._connection)
        except (OSError, EOFError) as error:
            raise ClusterError("the connection to the training ranks broke: one of them has ended") from error

    def reply(self, answer: Any) -> None:
        try:
            send(self._connection, answer)
        except OSError as error:
            raise ClusterError("the connection to the training ranks broke: one of them has ended") from error
