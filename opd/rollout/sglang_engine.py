"""The rollout engine made of SGLang servers: many requests in flight, answers yielded as they finish."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import queue
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from opd.background_loop import BackgroundLoop
from opd.config.schema import Config
from opd.errors import EngineError, TeacherError, WeightSyncError
from opd.serving import weight_push
from opd.serving.command import ServerOptions
from opd.serving.http import HttpError, JsonClient, base_url
from opd.serving.server import SGLangServer
from opd.serving.top_logprobs import top_request, top_rows
from opd.teachers.sglang_teacher import response_logprobs
from opd.types import GenerationRequest, GenerationResult, SampleStatus, SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STATUS = {"stop": SampleStatus.COMPLETED, "length": SampleStatus.TRUNCATED, "abort": SampleStatus.ABORTED}


@dataclass
class _Endpoint:
    """One server as the engine sees it; ``server`` is None for one that somebody else runs."""

    url: str
    server: SGLangServer | None
    client: JsonClient

    def dead(self) -> bool:
        return self.server is not None and not self.server.alive()

    def describe(self, what: str) -> str:
        if self.server is None:
            return f"the SGLang server at {self.url} {what}"
        tail = f"The end of its log ({self.server.log_path}):\n{self.server.log_tail()}"
        return f"the SGLang server at {self.url} {'has ended' if self.dead() else what}. {tail}"


class SGLangEngine:
    """``RolloutEngine`` over one or more SGLang servers.

    Args:
        servers: servers of ours, which ``close`` stops, or addresses of others'.
        max_running_requests: requests in flight per server.
        max_context_len: tokens of prompt and answer.
        sync_folder: where weights are written for the servers to read. Without it they go through shared memory, which
            needs servers on this machine.
        model_folder: Hugging Face folder whose config and tokenizer files are put into ``sync_folder``.
        request_timeout_s: for one answer.
    """

    def __init__(
        self,
        servers: Sequence[SGLangServer | str],
        *,
        max_running_requests: int,
        max_context_len: int,
        sync_folder: str | Path | None = None,
        model_folder: str | Path | None = None,
        request_timeout_s: float = 3600.0,
        retries: int = 3,
    ) -> None:
        if sync_folder is None and any(isinstance(server, str) for server in servers):
            raise ValueError("servers that were not started here take weights from a folder: give sync_folder")
        if (sync_folder is None) != (model_folder is None):
            raise ValueError("sync_folder and model_folder belong together: give both or neither")
        self.max_context_len = max_context_len
        self.weight_version = 0
        self._sync_folder = None if sync_folder is None else Path(sync_folder)
        self._model_folder = model_folder
        self._endpoints = []
        for server in servers:
            url = base_url(server if isinstance(server, str) else server.url)
            api_key = None if isinstance(server, str) else server.options.api_key
            client = JsonClient(url, request_timeout_s, retries, max_running_requests, api_key)
            self._endpoints.append(_Endpoint(url, None if isinstance(server, str) else server, client))
        self._loop = BackgroundLoop("sglang rollout")
        self._closed = False

    def generate(self, requests: list[GenerationRequest], params: SamplingParams) -> Iterator[GenerationResult]:
        """See ``RolloutEngine.generate``. Log-probs of a greedy answer are those at temperature 1.

        SGLang draws its noise from the request alone only when its deterministic mode is on, which the CPU backend does
        not have; otherwise two runs of the same seed differ.

        Raises:
            ValueError: a prompt that leaves no room for an answer.
            EngineError: a server is gone, refused a request, or returned log-probs of other tokens.
        """
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

    def set_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """See ``RolloutEngine.set_weights``. ``verify`` tells whether the servers took all of them."""
        if self._sync_folder is not None:
            folder = self._sync_folder / f"weights-{version}"
            weight_push.write_folder(named_tensors, folder, model_folder=self._model_folder)
            self._on_all(lambda e: weight_push.push_folder(e.client, folder, version=version))
            weight_push.remove_folder(folder)
        else:
            self._push_through_memory(named_tensors, version)
        self.weight_version = version

    def verify(self, tokens: list[int], expected_logprobs: list[float], *, tolerance: float) -> float:
        """See ``RolloutEngine.verify``; every server is asked."""
        expected_T = torch.tensor(expected_logprobs, dtype=torch.float64)
        worst = 0.0
        answers = self._on_all(lambda e: self._ask_logprobs(e, tokens))
        for endpoint, answer in zip(self._endpoints, answers, strict=True):
            try:
                actual = response_logprobs(answer, tokens, len(expected_logprobs))
            except TeacherError as error:
                raise WeightSyncError(f"the SGLang server at {endpoint.url} cannot be checked: {error}") from error
            difference = float((torch.tensor(actual, dtype=torch.float64) - expected_T).abs().mean())
            if not difference <= tolerance:
                raise WeightSyncError(
                    f"after the weight sync the log-probs of the SGLang server at {endpoint.url} are off by "
                    f"{difference:.3g} nats per token, more than --max-logprob-mismatch={tolerance}: it does not hold "
                    "the trainer's weights"
                )
            worst = max(worst, difference)
        return worst

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.close()
        for endpoint in self._endpoints:
            if endpoint.server is not None:
                endpoint.server.stop()

    async def _generate_all(
        self, requests: list[GenerationRequest], params: SamplingParams, put: Callable[[Any], None]
    ) -> None:
        """Puts one result per request, or the first error and nothing more."""
        # Answers to one prompt go to one server, which then holds the prompt's prefix once.
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt_ids for r in requests))}

        async def one(request: GenerationRequest) -> None:
            endpoint = self._endpoints[prompts[request.prompt_ids] % len(self._endpoints)]
            put(await self._generate_one(endpoint, request, params))

        try:
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    group.create_task(one(request))
        except BaseExceptionGroup as errors:
            put(errors.exceptions[0])

    async def _generate_one(
        self, endpoint: _Endpoint, request: GenerationRequest, params: SamplingParams
    ) -> GenerationResult:
        limit = min(params.max_new_tokens, self.max_context_len - len(request.prompt_ids))
        payload = {
            "input_ids": list(request.prompt_ids),
            "sampling_params": {
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
                "max_new_tokens": limit,
                "stop_token_ids": list(params.stop_token_ids) or None,
                "ignore_eos": not params.stop_token_ids,
                "sampling_seed": request_seed(params.seed, request.key),
            },
            "return_logprob": True,
            **(top_request("output", params.top_ids) if params.top_ids else {}),
        }
        try:
            answer = await endpoint.client.post("/generate", payload, give_up=endpoint.dead)
        except HttpError as error:
            if error.reason != "timeout" or endpoint.dead():
                raise EngineError(endpoint.describe(f"could not be used ({error})")) from error
            logger.warning("request %d aborted: %s", request.key, error)
            return GenerationResult(key=request.key, response_ids=[], log_probs=[], status=SampleStatus.ABORTED)
        return self._result(endpoint, request, answer, params.top_ids)

    def _result(
        self, endpoint: _Endpoint, request: GenerationRequest, answer: dict[str, Any], top_ids: int
    ) -> GenerationResult:
        meta = answer["meta_info"]
        ids = answer["output_ids"]
        entries = meta.get("output_token_logprobs") or []
        status = _STATUS[meta["finish_reason"]["type"]]
        if [entry[1] for entry in entries] != ids:
            if status is not SampleStatus.ABORTED:
                raise EngineError(
                    f"{endpoint.url} returned log-probs of other tokens than its answer to request {request.key}"
                )
            ids, entries = [], []
        version = str(meta.get("weight_version", ""))
        return GenerationResult(
            key=request.key,
            response_ids=ids,
            log_probs=[float(entry[0]) for entry in entries],
            status=status,
            weight_version=int(version) if version.isdecimal() else self.weight_version,
            top_ids=self._top_ids(endpoint, meta, len(ids), top_ids) if top_ids and ids else None,
        )

    def _top_ids(self, endpoint: _Endpoint, meta: dict[str, Any], length: int, count: int) -> list[list[int]]:
        try:
            ids_TK, _ = top_rows(meta, "output", positions=length, count=count)
        except ValueError as error:
            raise EngineError(
                f"{endpoint.url} returned no {count} likeliest tokens at each position: {error}"
            ) from error
        return ids_TK.tolist()

    def _push_through_memory(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        limit = min(weight_push.BUCKET_BYTES, weight_push.free_shared_memory() // 2)
        self._on_all(lambda e: weight_push.command(e.client, "/begin_weight_update", {}))
        pending = weight_push.buckets(named_tensors, limit)
        bucket = next(pending, None)
        while bucket is not None:
            payload, block = weight_push.share_bucket(bucket)
            bucket = next(pending, None)
            self._push_payload(payload, version if bucket is None else None)
            del block  # the servers have copied it
        self._on_all(lambda e: weight_push.command(e.client, "/end_weight_update", {}))

    def _push_payload(self, payload: str, version: int | None) -> None:
        self._on_all(
            lambda e: weight_push.push_bucket(e.client, payload, tp_size=e.server.options.tp_size, version=version)
        )

    async def _ask_logprobs(self, endpoint: _Endpoint, tokens: list[int]) -> Any:
        payload = {
            "input_ids": tokens,
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        try:
            return await endpoint.client.post("/generate", payload, give_up=endpoint.dead)
        except HttpError as error:
            raise EngineError(endpoint.describe(f"could not be used ({error})")) from error

    def _on_all(self, start: Callable[[_Endpoint], Coroutine[Any, Any, T]]) -> list[T]:
        """Runs one coroutine per server, all at once."""

        async def run() -> list[T]:
            return await asyncio.gather(*(start(endpoint) for endpoint in self._endpoints))

        try:
            return self._loop.run(run())
        except WeightSyncError as error:
            for endpoint in self._endpoints:
                if endpoint.dead():
                    raise WeightSyncError(f"{error}: {endpoint.describe('')}") from error
            raise


def request_seed(seed: int, key: int) -> int:
    """A seed of its own for each request, from (run's seed, key) alone; in SGLang's range, below 2**63."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def start_engine(config: Config, *, dtype: torch.dtype, device: torch.device, max_context_len: int) -> SGLangEngine:
    """Starts the servers that the flags ask for and waits until all answer.

    Raises:
        EngineError: a server did not come up; none is left running.
    """
    flags = config.rollout
    tp_size = flags.rollout_num_gpus_per_engine
    count = flags.rollout_num_gpus // tp_size
    per_server = -(-flags.rollout_max_running_requests // count)
    logs = Path(config.output.output_dir or tempfile.mkdtemp(prefix="opd-sglang-"))
    servers: list[SGLangServer] = []
    try:
        for i in range(count):
            options = ServerOptions(
                model_path=str(config.checkpoint.hf_checkpoint),
                device=device.type,
                dtype=str(dtype).removeprefix("torch."),
                context_length=max_context_len,
                max_running_requests=per_server,
                mem_fraction_static=flags.sglang_mem_fraction_static,
                tp_size=tp_size,
                base_gpu_id=_first_gpu(config, device) + i * tp_size,
                random_seed=flags.rollout_seed + i,
                trust_remote_code=config.output.trust_remote_code,
            )
            port = None if flags.sglang_port is None else flags.sglang_port + i
            servers.append(SGLangServer(options, log_path=logs / f"sglang_rollout_{i}.log", port=port))
        for server in servers:
            seconds = server.wait_ready(flags.sglang_server_timeout)
            logger.info("SGLang server %s ready after %.1f s", server.url, seconds)
    except EngineError:
        for server in servers:
            server.stop()
        raise
    through_folder = _checkpoint_bytes(config.checkpoint.hf_checkpoint) > weight_push.free_shared_memory()
    return SGLangEngine(
        servers,
        max_running_requests=per_server,
        max_context_len=max_context_len,
        sync_folder=logs / "weight_sync" if through_folder else None,
        model_folder=config.checkpoint.hf_checkpoint if through_folder else None,
    )


def _first_gpu(config: Config, device: torch.device) -> int:
    """Behind the training ranks' GPUs where the machine has enough of them, else shared with them, from the first."""
    training = config.parallel.actor_num_gpus_per_node
    enough = device.type == "cuda" and torch.cuda.device_count() >= training + config.rollout.rollout_num_gpus
    return training if enough else 0


def _checkpoint_bytes(folder: str | Path) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
