"""The rollout engine made of SGLang servers: many requests in flight, answers yielded as they finish."""

from __future__ import annotations

import asyncio
import logging
import queue
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from opd.background_loop import BackgroundLoop
from opd.config.schema import Config
from opd.errors import EngineError, WeightSyncError
from opd.rollout.broadcast_sync import BroadcastSync
from opd.rollout.current_weights import CurrentWeights, Probe
from opd.rollout.engine_server import EngineServer
from opd.rollout.revival import Reviver
from opd.rollout.routes import LeastLoaded, PromptGroup, Route, ThroughRouter
from opd.rollout.sglang_answers import generate_payload, generation_result, room
from opd.rollout.sglang_start import start_servers, weight_sync_method
from opd.rollout.weight_sync import FolderSync, MemorySync, WeightSync
from opd.serving.hosts import ServerHost
from opd.serving.http import HttpError, JsonClient, base_url
from opd.serving.router import SGLangRouter
from opd.serving.server import SGLangServer
from opd.types import GenerationRequest, GenerationResult, SampleStatus, SamplingParams

logger = logging.getLogger(__name__)


class SGLangEngine:
    """``RolloutEngine`` over one or more SGLang servers.

    A server of ours that dies is started again and given the current weights, which costs memory for a copy of them
    (``MemorySync``, ``BroadcastSync``) or disk (``FolderSync``); requests that it had are sent again.

    Args:
        servers: servers of ours, which ``close`` stops, or addresses of others'.
        max_running_requests: requests in flight per server.
        max_context_len: tokens of prompt and answer.
        sync_folder: where weights are written for the servers to read. Without it they go through shared memory, which
            needs servers on this machine.
        model_folder: Hugging Face folder whose config and tokenizer files are put into ``sync_folder``.
        broadcast_from: instead of these two: weights are broadcast from this device to servers of ours.
        router: in front of all servers, ready; requests for answers go to it. ``close`` stops it.
        request_timeout_s: for one answer.
        max_restarts: of each server of ours, and of the router; without any no copy of the weights is kept.
        start_timeout_s: for one restart.
        shares_gpus: with the trainer; the servers were started with ``ServerOptions.memory_saver``.
    """

    stats_prefix = "engine_"

    def __init__(
        self,
        servers: Sequence[SGLangServer | str],
        *,
        max_running_requests: int,
        max_context_len: int,
        sync_folder: str | Path | None = None,
        model_folder: str | Path | None = None,
        broadcast_from: torch.device | None = None,
        router: SGLangRouter | None = None,
        request_timeout_s: float = 3600.0,
        retries: int = 3,
        max_restarts: int = 3,
        start_timeout_s: float = 180.0,
        shares_gpus: bool = False,
    ) -> None:
        if sync_folder is None and any(isinstance(server, str) for server in servers):
            raise ValueError("servers that were not started here take weights from a folder: give sync_folder")
        if (sync_folder is None) != (model_folder is None):
            raise ValueError("sync_folder and model_folder belong together: give both or neither")
        if sync_folder is not None and broadcast_from is not None:
            raise ValueError("weights go through sync_folder or by broadcast: give one of them")
        self.max_context_len = max_context_len
        self._servers = []
        for server in servers:
            url = base_url(server if isinstance(server, str) else server.url)
            api_key = None if isinstance(server, str) else server.options.api_key
            client = JsonClient(url, request_timeout_s, retries, max_running_requests, api_key)
            self._servers.append(EngineServer(url, None if isinstance(server, str) else server, client))
        self._router = router
        self._loop = BackgroundLoop("sglang rollout")
        keep = max_restarts > 0 and not all(isinstance(server, str) for server in servers)
        sync: WeightSync
        if broadcast_from is not None:
            sync = BroadcastSync(self._loop, device=broadcast_from, keep=keep)
        elif sync_folder is not None:
            sync = FolderSync(sync_folder, model_folder=model_folder, keep=keep)
        else:
            sync = MemorySync(keep=keep)
        self._weights = CurrentWeights(self._loop, sync)
        self._reviver = Reviver(self._weights, max_restarts=max_restarts, start_timeout_s=start_timeout_s)
        self._route: Route
        if router is None:
            self._route = LeastLoaded(self._servers, self._reviver, limit=max_running_requests, retries=retries)
        else:
            through = JsonClient(router.url, request_timeout_s, retries, max_running_requests * len(servers))
            self._route = ThroughRouter(
                router,
                through,
                self._servers,
                self._reviver,
                max_restarts=max_restarts,
                start_timeout_s=start_timeout_s,
                retries=retries,
            )
        self._shares_gpus = shares_gpus
        self._closed = False

    @property
    def weight_version(self) -> int:
        return self._weights.version or 0

    def generate(self, requests: list[GenerationRequest], params: SamplingParams) -> Iterator[GenerationResult]:
        """See ``RolloutEngine.generate``. Log-probs of a greedy answer are those at temperature 1.

        SGLang draws its noise from the request alone only when its deterministic mode is on, which the CPU backend does
        not have; otherwise two runs of the same seed differ.

        Raises:
            ValueError: a prompt that leaves no room for an answer.
            EngineError: a server is gone for good, refused a request, or returned log-probs of other tokens; or the
                servers have no weights since ``release_memory``.
        """
        if any(server.released for server in self._servers):
            raise EngineError("the SGLang servers have given their memory away: set_weights comes before an answer")
        longest = max((len(r.prompt_ids) for r in requests), default=0)
        if longest >= self.max_context_len:
            raise ValueError(
                f"a prompt of {longest} tokens leaves no room for an answer within {self.max_context_len} tokens"
            )
        finished: queue.SimpleQueue[GenerationResult | BaseException] = queue.SimpleQueue()
        work = self._loop.submit(self._generate_all(requests, params, finished.put))
        try:
            for _ in requests:
                result = finished.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            work.cancel()

    def take_stats(self) -> dict[str, float]:
        """Of each server, in their order from 1, the seconds in which it had a request since the last call; nothing
        behind a router, which does not say who got what."""
        busy = [server.take_busy_seconds() for server in self._servers]
        return {f"{n}/busy_seconds": seconds for n, seconds in enumerate(busy, start=1)} if any(busy) else {}

    def set_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """See ``RolloutEngine.set_weights``. ``verify`` tells whether the servers took all of them.

        Another thread may be in ``generate``: its requests wait and go on with the new weights, and the
        ``weight_spans`` of their results name both versions. A server that dies meanwhile is started again.
        """
        self._weights.update(self._servers, named_tensors, version)
        try:
            self._loop.run(self._reviver.all_ready(self._servers))
        except EngineError as error:
            raise WeightSyncError(str(error)) from error
        for server, held in zip(self._servers, self._loop.run(self._held_versions()), strict=True):
            if held != str(version):
                raise WeightSyncError(
                    f"the SGLang server at {server.url} says that it holds weights of version {held} after an update "
                    f"to {version}: somebody else gives it weights too. Give the run servers of its own."
                )

    def release_memory(self) -> None:
        """The servers' weights, caches and graphs leave the GPUs that they share with the trainer, until the next
        ``set_weights``. Nothing happens without ``shares_gpus``. Not while another thread is in ``generate``.

        Raises:
            EngineError, WeightSyncError: a server refused.
        """
        if self._shares_gpus:
            self._weights.release_memory(self._servers)

    def verify(self, tokens: list[int], expected_logprobs: list[float], *, tolerance: float) -> float:
        """See ``RolloutEngine.verify``; every server is asked. A server that is restarted later has to pass it too."""
        probe = Probe(tokens=tokens, expected=expected_logprobs, tolerance=tolerance)
        worst = max(self._loop.run(self._check(probe)))
        self._weights.probe = probe
        return worst

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.close()
        if self._router is not None:
            self._router.stop()
        for server in self._servers:
            if server.server is not None:
                server.server.stop()
        self._weights.close()

    async def _generate_all(
        self, requests: list[GenerationRequest], params: SamplingParams, put: Callable[[Any], None]
    ) -> None:
        """Puts one result per request, or the first error and nothing more."""
        sizes = Counter(request.prompt_ids for request in requests)
        groups = {prompt_ids: PromptGroup(size=size) for prompt_ids, size in sizes.items()}

        async def one(request: GenerationRequest) -> None:
            put(await self._generate_one(groups[request.prompt_ids], request, params))

        try:
            async with asyncio.TaskGroup() as everything:
                watch = everything.create_task(self._reviver.watch(self._servers))
                async with asyncio.TaskGroup() as answers:
                    for request in requests:
                        answers.create_task(one(request))
                watch.cancel()
        except BaseExceptionGroup as errors:
            put(_first(errors))

    async def _generate_one(
        self, group: PromptGroup, request: GenerationRequest, params: SamplingParams
    ) -> GenerationResult:
        payload = generate_payload(request, params, max_context_len=self.max_context_len)
        try:
            answer, url = await self._route.post(group, payload)
        except HttpError as error:
            logger.warning("request %d aborted: %s", request.key, error)
            return GenerationResult(key=request.key, response_ids=[], log_probs=[], status=SampleStatus.ABORTED)
        _, pauses = room(request, params, max_context_len=self.max_context_len)
        version = self._weights.version
        return generation_result(answer, request, url=url, top_ids=params.top_ids, given_version=version, pauses=pauses)

    async def _check(self, probe: Probe) -> list[float]:
        return await asyncio.gather(*(self._check_one(server, probe) for server in self._servers))

    async def _check_one(self, server: EngineServer, probe: Probe) -> float:
        while True:
            try:
                return await probe.check(server)
            except HttpError as error:
                if not await server.died_of(error):
                    raise EngineError(server.describe(f"could not be used ({error})")) from error
                await self._reviver.all_ready([server])

    async def _held_versions(self) -> list[str]:
        return await asyncio.gather(*(server.held_version() for server in self._servers))


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def start_engine(
    config: Config,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_context_len: int,
    host: ServerHost | None = None,
) -> SGLangEngine:
    """Starts the servers that the flags ask for, and the router, and waits until all answer.

    Args:
        host: where the servers are started; on this machine without it.

    Raises:
        EngineError: one did not come up, or cannot take weights as --sglang-weight-sync says; none is left running.
    """
    flags = config.rollout
    method = weight_sync_method(config, device, host)
    started = start_servers(config, dtype=dtype, device=device, max_context_len=max_context_len, host=host)
    by_folder = method == "disk"
    return SGLangEngine(
        started.servers,
        router=started.router,
        max_running_requests=started.requests_per_server,
        max_context_len=max_context_len,
        sync_folder=started.folder / "weight_sync" if by_folder else None,
        model_folder=config.checkpoint.hf_checkpoint if by_folder else None,
        broadcast_from=device if method == "distributed" else None,
        request_timeout_s=flags.sglang_request_timeout,
        max_restarts=flags.sglang_max_restarts,
        start_timeout_s=flags.sglang_server_timeout,
        shares_gpus=started.memory_saver,
    )
