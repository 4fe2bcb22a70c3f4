"""Parameters of one SGLang server -> its command line and environment."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# SGLang keeps some positions of a context to itself (input at most context - 6, output one less than what is left), so
# a server whose context is exactly the longest sequence we want would cut that sequence short.
CONTEXT_SLACK = 8
# Without a limit the CPU engine sizes its KV cache by the machine's whole memory. 16,384 tokens of Qwen3-0.6B in
# float32 are 3.7 GB; requests that do not fit wait in the server's queue.
CPU_MAX_TOTAL_TOKENS = 16_384
# A launcher's variables describe the training ranks; SGLang would take them for its own. With those of torchrun it
# would wait for ever for a store that torchrun hosts for the training ranks alone.
_LAUNCHERS = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    model_path: str
    device: str = "cpu"  # cpu or cuda
    dtype: str = "float32"
    context_length: int = 2048  # tokens of the longest prompt and answer
    max_running_requests: int = 256
    max_total_tokens: int | None = None  # tokens in the KV cache; on CPU a bounded default
    mem_fraction_static: float | None = None  # GPU memory for weights and KV cache
    tp_size: int = 1
    base_gpu_id: int = 0
    memory_saver: bool = False  # the server can give its GPU memory away and take it back; CUDA only
    random_seed: int = 42
    trust_remote_code: bool = False
    api_key: str | None = None
    extra_args: tuple[str, ...] = ()


def server_command(options: ServerOptions, *, host: str, port: int, parent_pid: int | None = None) -> list[str]:
    """The command line. The radix cache stays on: a group's answers share their prompt's prefix."""
    command = [sys.executable, "-m", "opd.serving.sglang_cpu"]
    if parent_pid is not None:
        command += ["--parent-pid", str(parent_pid)]
    command += [
        *("--model-path", options.model_path),
        *("--host", host),
        *("--port", str(port)),
        *("--device", options.device),
        *("--dtype", options.dtype),
        *("--context-length", str(options.context_length + CONTEXT_SLACK)),
        *("--max-running-requests", str(options.max_running_requests)),
        *("--tp-size", str(options.tp_size)),
        *("--random-seed", str(options.random_seed)),
        *("--log-level-http", "warning"),
        "--skip-server-warmup",  # ``SGLangServer.wait_ready`` sends the first request itself
    ]
    max_total_tokens = options.max_total_tokens
    if options.device == "cpu":
        command += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        command += ["--disable-cuda-graph", "--disable-overlap-schedule"]
        command += ["--sleep-on-idle"]  # its idle loop would take a core from the trainer and the other server
        if max_total_tokens is None:
            longest = options.context_length + CONTEXT_SLACK
            max_total_tokens = max(2 * longest, min(options.max_running_requests * longest, CPU_MAX_TOTAL_TOKENS))
    else:
        command += ["--base-gpu-id", str(options.base_gpu_id)]
    if max_total_tokens is not None:
        command += ["--max-total-tokens", str(max_total_tokens)]
    if options.mem_fraction_static is not None:
        command += ["--mem-fraction-static", str(options.mem_fraction_static)]
    if options.memory_saver:
        command += ["--enable-memory-saver"]
    if options.trust_remote_code:
        command += ["--trust-remote-code"]
    if options.api_key is not None:
        command += ["--api-key", options.api_key]
    return [*command, *options.extra_args]


def server_environment(base: Mapping[str, str], *, device: str, memory_saver: bool = False) -> dict[str, str]:
    """``base`` with what the server needs; a value that ``base`` sets is kept."""
    root = str(Path(__file__).resolve().parents[2])  # ``opd`` must be importable from any working directory
    environment = {
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # for CONTEXT_SLACK; positions stay within the model's
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        **base,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, base.get("PYTHONPATH")))),
    }
    if memory_saver:
        # A health check that generates a token would compute in memory that is given away.
        environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "false"
        environment["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "true"  # its graphs' memory goes with the rest
        # Pipeline stages of the trainer take different shares of the devices that one server spans.
        environment["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "false"
    if device == "cpu":
        # Three processes with a thread pool each make two cores crawl.
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return {name: value for name, value in environment.items() if not _LAUNCHERS.fullmatch(name)}
