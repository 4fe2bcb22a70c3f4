"""Weights by broadcast: the trainer's rank 0 and each server form a process group, gloo on CPU and NCCL on CUDA."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

import torch

from opd.background_loop import BackgroundLoop
from opd.errors import WeightSyncError
from opd.rollout.engine_server import EngineServer, Receivers
from opd.rollout.weight_sync import NamedTensors
from opd.serving import weight_push
from opd.serving.process import free_port, own_address
from opd.serving.update_group import UpdateGroup, backend_of, flat_bucket
from opd.serving.weight_copy import WeightCopy

logger = logging.getLogger(__name__)


class BroadcastSync:
    """``WeightSync`` through ``/update_weights_from_distributed``.

    One group per server, so that the death of one breaks no other's; the price is that rank 0 sends every bucket once
    per server. A group ends with its server and is built anew for the restarted one. Keeps a ``WeightCopy`` unless
    ``keep`` is False.

    Args:
        device: where rank 0 sends from; with CUDA no server may share that GPU (NCCL refuses).
    """

    def __init__(self, loop: BackgroundLoop, *, device: torch.device, keep: bool = True) -> None:
        self._loop = loop
        self._device = device
        self._copy = WeightCopy() if keep else None
        self._groups: dict[str, tuple[UpdateGroup, int]] = {}  # address -> group, the server's restarts at its making
        self._made = 0

    def push(self, receivers: Receivers, named_tensors: NamedTensors, version: int) -> None:
        """See ``WeightSync.push``."""
        self._send(receivers, self._copy.recorded(named_tensors) if self._copy else named_tensors, version)

    def repeat(self, receivers: Receivers, version: int) -> None:
        """See ``WeightSync.repeat``."""
        self._send(receivers, self._copy.read(), version)

    def close(self) -> None:
        for group, _ in self._groups.values():
            group.close()
        self._groups.clear()

    def _send(self, receivers: Receivers, named_tensors: NamedTensors, version: int) -> None:
        for server in list(receivers.live):
            self._join(receivers, server)
        receivers.each(lambda s: weight_push.command(s.client, "/begin_weight_update", {}, give_up=s.dead))
        pending = weight_push.buckets(named_tensors, weight_push.BUCKET_BYTES)
        bucket = next(pending, None)
        while bucket is not None:
            described, flat = flat_bucket(bucket)
            bucket = next(pending, None)
            last = bucket is None
            body = described | {"flush_cache": last} | ({"weight_version": str(version)} if last else {})
            for server in list(receivers.live):
                self._broadcast(receivers, server, body, flat)
        receivers.each(lambda s: weight_push.command(s.client, "/end_weight_update", {}, give_up=s.dead))

    def _join(self, receivers: Receivers, server: EngineServer) -> None:
        """Makes the group of a server that has none, or whose group ended with it."""
        group, restarts = self._groups.get(server.url, (None, -1))
        if group is not None and restarts == server.restarts:
            return
        if group is not None:
            group.close()
        if server.dead():  # nobody would join
            receivers.drop(server)
            return
        host = own_address(towards=urlsplit(server.url).hostname)
        place = {"host": host, "port": free_port(host), "name": f"opd_weights_{self._made}"}
        self._made += 1
        world_size = 1 + server.server.options.tp_size
        body = {
            "master_address": host,
            "master_port": place["port"],
            "rank_offset": 1,
            "world_size": world_size,
            "group_name": place["name"],
            "backend": backend_of(self._device),
        }
        joining = self._start(server, "/init_weights_update_group", body)
        try:
            group = UpdateGroup(world_size=world_size, device=self._device, **place)
        except RuntimeError as error:
            self._settle(receivers, server, joining, error)
            return
        self._groups[server.url] = (group, server.restarts)
        self._settle(receivers, server, joining, None)

    def _broadcast(self, receivers: Receivers, server: EngineServer, body: dict[str, Any], flat: torch.Tensor) -> None:
        group, _ = self._groups[server.url]
        receiving = self._start(server, "/update_weights_from_distributed", body | {"group_name": group.name})
        broken = None
        try:
            # It waits for the server's side, so an answer before the end is a refusal.
            group.broadcast(flat, give_up=lambda: server.dead() or receiving.done())
        except RuntimeError as error:
            broken = error
        self._settle(receivers, server, receiving, broken)

    def _start(self, server: EngineServer, path: str, body: dict[str, Any]) -> Future[None]:
        return self._loop.submit(weight_push.command(server.client, path, body, give_up=server.dead))

    def _settle(
        self, receivers: Receivers, server: EngineServer, answer: Future[None], broken: RuntimeError | None
    ) -> None:
        """Waits for the server's answer; drops it if it has died.

        Raises:
            WeightSyncError: it lives and refused, or the connection to it broke.
        """
        try:
            answer.result()
        except WeightSyncError as error:
            if self._loop.run(server.died_of(error)):
                receivers.drop(server)
                return
            raise
        if broken is not None:
            raise WeightSyncError(
                f"--sglang-weight-sync=distributed: the group of rank 0 and the SGLang server at {server.url} broke "
                f"({broken}). Use --sglang-weight-sync=memory or disk."
            ) from broken
