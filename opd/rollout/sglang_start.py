"""The SGLang servers and the router that the flags ask for, started and ready."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from opd.config.schema import Config
from opd.errors import EngineError
from opd.serving import weight_push
from opd.serving.command import ServerOptions
from opd.serving.router import SGLangRouter, require_router
from opd.serving.server import SGLangServer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Started:
    """
    Args:
        folder: with their logs; weights may be written there.
        requests_per_server: in flight.
    """

    servers: list[SGLangServer]
    router: SGLangRouter | None
    folder: Path
    requests_per_server: int


def start_servers(config: Config, *, dtype: torch.dtype, device: torch.device, max_context_len: int) -> Started:
    """
    Raises:
        EngineError: one did not come up; none is left running.
    """
    flags = config.rollout
    if flags.use_sglang_router:
        require_router()
    count = flags.rollout_num_gpus // flags.rollout_num_gpus_per_engine
    per_server = -(-flags.rollout_max_running_requests // count)
    folder = Path(config.output.output_dir or tempfile.mkdtemp(prefix="opd-sglang-"))
    with ExitStack() as on_failure:
        servers = []
        for i in range(count):
            options = _server_options(config, i, per_server, dtype=dtype, device=device, context=max_context_len)
            port = None if flags.sglang_port is None else flags.sglang_port + i
            servers.append(SGLangServer(options, log_path=folder / f"sglang_rollout_{i}.log", port=port))
            on_failure.callback(servers[-1].stop)
        for server in servers:
            seconds = server.wait_ready(flags.sglang_server_timeout)
            logger.info("SGLang server %s ready after %.1f s", server.url, seconds)
        router = None
        if flags.use_sglang_router:
            urls = [server.url for server in servers]
            router = SGLangRouter(urls, log_path=folder / "sglang_router.log")
            on_failure.callback(router.stop)
            router.wait_ready(urls, flags.sglang_server_timeout)
        on_failure.pop_all()
    return Started(servers=servers, router=router, folder=folder, requests_per_server=per_server)


def weight_sync_method(
    config: Config,
    device: torch.device,
    *,
    free_shared_memory: Callable[[], int] = weight_push.free_shared_memory,
) -> str:
    """ "memory", "disk" or "distributed": what --sglang-weight-sync says, or for "auto" memory if it holds the weights.

    Raises:
        EngineError: "distributed" with servers on the trainer's own GPUs.
    """
    given = config.rollout.sglang_weight_sync
    if given == "distributed" and device.type == "cuda" and first_gpu(config, device) == 0:
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
        random_seed=flags.rollout_seed + number,
        trust_remote_code=config.output.trust_remote_code,
    )


def _checkpoint_bytes(folder: str | Path) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
