"""The SGLang servers and the router that the flags ask for, started and ready."""

from __future__ import annotations

import logging
import shlex
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from opd.config.schema import Config
from opd.errors import EngineError
from opd.serving import weight_push
from opd.serving.command import ServerOptions
from opd.serving.hosts import Server, ServerHost, ThisMachine
from opd.serving.memory_occupation import require_memory_saver
from opd.serving.router import SGLangRouter, require_router

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Started:
    """
    Args:
        folder: with their logs; weights may be written there.
        requests_per_server: in flight.
        memory_saver: the servers can give their GPU memory to the trainer.
    """

    servers: list[Server]
    router: SGLangRouter | None
    folder: Path
    requests_per_server: int
    memory_saver: bool


def start_servers(
    config: Config,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_context_len: int,
    host: ServerHost | None = None,
) -> Started:
    """
    Args:
        host: where the servers are started, on this machine without it; the router is on this machine.

    Raises:
        EngineError: one did not come up; none is left running.
    """
    host = host or ThisMachine()
    flags = config.rollout
    if flags.use_sglang_router:
        require_router()
    memory_saver = config.releases_engine_memory and device.type == "cuda"
    if memory_saver:
        require_memory_saver()
    count = flags.rollout_num_gpus // flags.rollout_num_gpus_per_engine
    per_server = flags.rollout_max_running_requests
    folder = Path(config.output.output_dir or tempfile.mkdtemp(prefix="opd-sglang-"))
    with ExitStack() as on_failure:
        servers = []
        for i in range(count):
            options = _server_options(config, i, per_server, dtype=dtype, device=device, context=max_context_len)
            if host.assigns_devices:
                options = replace(options, base_gpu_id=0)
            port = None if flags.sglang_port is None else flags.sglang_port + i
            servers.append(host.start(i, options, log_path=folder / f"sglang_rollout_{i}.log", port=port))
            on_failure.callback(servers[-1].stop)
        for server in servers:
            seconds = server.wait_ready(flags.sglang_server_timeout)
            logger.info("SGLang server %s ready after %.1f s", server.url, seconds)
        router = None
        if flags.use_sglang_router:
            urls = [server.url for server in servers]
            router = SGLangRouter(
                urls, log_path=folder / "sglang_router.log", request_timeout_s=flags.sglang_request_timeout
            )
            on_failure.callback(router.stop)
            router.wait_ready(urls, flags.sglang_server_timeout)
        on_failure.pop_all()
    return Started(
        servers=servers, router=router, folder=folder, requests_per_server=per_server, memory_saver=memory_saver
    )


def weight_sync_method(
    config: Config,
    device: torch.device,
    host: ServerHost | None = None,
    *,
    free_shared_memory: Callable[[], int] = weight_push.free_shared_memory,
) -> str:
    """ "memory", "disk" or "distributed": what --sglang-weight-sync says, or for "auto" memory if it holds the weights.
    Servers on other machines (``host``) take them by broadcast, or from a folder that all machines see.

    Raises:
        EngineError: "distributed" with servers on the trainer's own GPUs, "memory" with servers on other machines.
    """
    given = config.rollout.sglang_weight_sync
    if host is not None and host.assigns_devices:
        shared = config.launch.colocate and device.type == "cuda"
    else:
        shared = device.type == "cuda" and first_gpu(config, device) == 0
    if host is not None and not host.shares_memory:
        if given == "memory":
            raise EngineError(
                "`--sglang-weight-sync=memory` needs all SGLang servers on the machine of the first training rank, and "
                "Ray has placed some on others. Give `--sglang-weight-sync=auto`."
            )
        if given == "auto":
            return "disk" if shared else "distributed"
    if given == "distributed" and shared:
        raise EngineError(
            "`--sglang-weight-sync=distributed` needs GPUs of their own for the SGLang servers: NCCL refuses two "
            f"processes on one, and this machine has {torch.cuda.device_count()} for "
            f"{config.parallel.actor_num_gpus_per_node} training ranks and {config.rollout.rollout_num_gpus} of the "
            "servers. Give `--sglang-weight-sync=auto`."
        )
    if given != "auto":
        return given
    return "disk" if _checkpoint_bytes(config.checkpoint.hf_checkpoint) > free_shared_memory() else "memory"


def first_gpu(config: Config, device: torch.device) -> int:
    """Behind the training ranks' GPUs where the machine has enough of them, else shared with them, from the first."""
    training = config.parallel.actor_num_gpus_per_node
    enough = device.type == "cuda" and torch.cuda.device_count() >= training + config.rollout.rollout_num_gpus
    return training if enough else 0


def _server_options(
    config: Config, number: int, max_running_requests: int, *, dtype: torch.dtype, device: torch.device, context: int
) -> ServerOptions:
    flags = config.rollout
    tp_size = flags.rollout_num_gpus_per_engine
    return ServerOptions(
        model_path=str(config.checkpoint.hf_checkpoint),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        context_length=context,
        max_running_requests=max_running_requests,
        mem_fraction_static=flags.sglang_mem_fraction_static,
        tp_size=tp_size,
        base_gpu_id=first_gpu(config, device) + number * tp_size,
        memory_saver=config.releases_engine_memory and device.type == "cuda",
        random_seed=flags.rollout_seed + number,
        trust_remote_code=config.output.trust_remote_code,
        extra_args=tuple(shlex.split(flags.sglang_server_args or "")),
    )


def _checkpoint_bytes(folder: str | Path) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
