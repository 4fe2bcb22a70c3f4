"""Rules about who starts which processes: this one alone, torchrun, or Ray."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

from opd.config.flags import flag_text
from opd.config.queries import given
from opd.config.schema import Config

_RAY_FLAGS = ("ray_address", "ray_cpus_per_process", "ray_timeout", "colocate")
_CRITIC_FLAGS = ("critic_num_nodes", "critic_num_gpus_per_node")


def uses_ray(config: Config, environ: Mapping[str, str]) -> bool:
    """Whether Ray starts the training ranks; without it this process is one of them."""
    launch = config.launch
    if launch.launcher != "auto":
        return launch.launcher == "ray"
    if "WORLD_SIZE" in environ:  # torchrun has started the ranks
        return False
    several = config.parallel.world_size > 1 or config.critic_world_size > 0
    return several or ray_address(config, environ) is not None


def ray_address(config: Config, environ: Mapping[str, str]) -> str | None:
    """Of a running cluster; None: the run makes one of this machine."""
    return config.launch.ray_address or environ.get("RAY_ADDRESS") or None


def launch_flag_rules(config: Config) -> Iterator[str]:
    """Between flags alone."""
    yield from _critic_rules(config)
    yield from _teacher_server_rules(config)
    yield from _colocation_rules(config)
    launch = config.launch
    if launch.launcher == "local":
        for name in _RAY_FLAGS:
            if name in given(launch):
                yield (
                    f"{flag_text(name, getattr(launch, name))} needs Ray, and `--launcher=local` does without. Drop "
                    "one of them."
                )
    if launch.ray_address is not None and "://" in launch.ray_address:
        yield (
            f"{flag_text('ray_address', launch.ray_address)} must be the HOST:PORT of the cluster's head, and this "
            "machine one of its nodes: a run streams its output, which Ray's client and job protocols do not carry. "
            "Start it on a node of the cluster, or with `ray job submit`."
        )


def launch_environment_rules(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    """Against what has started this process, and what is installed. A dry run plans for other machines too."""
    started, wanted, parallel = environ.get("WORLD_SIZE"), config.parallel.world_size, config.parallel
    if uses_ray(config, environ):
        if started is not None:
            yield (
                f"`--launcher=ray` under torchrun (WORLD_SIZE={started}): each of its processes would start a run of "
                "its own. Start with plain `python train.py`, or drop the flag."
            )
        elif importlib.util.find_spec("ray") is None:
            yield (
                f"{_why_ray(config, environ)} needs the `ray` package, which is not installed. Install it with `pip "
                f"install ray`, or start with `torchrun --nproc-per-node {parallel.actor_num_gpus_per_node} train.py`."
            )
        return
    if (started or "1") != str(wanted):
        per_node = parallel.actor_num_gpus_per_node
        yield (
            f"{wanted} training ranks are asked for (--actor-num-nodes {parallel.actor_num_nodes} x "
            f"--actor-num-gpus-per-node {per_node}) and {started or '1'} started. Start with `torchrun "
            f"--nproc-per-node {per_node} train.py`, or change the flags."
        )
    for name in _CRITIC_FLAGS:
        value = getattr(config.critic, name)
        if value is not None:
            yield (
                f"{flag_text(name, value)} needs Ray, which places the critic's own ranks: this run was started "
                "without. Start with plain `python train.py` and without `--launcher=local`, or drop the flag."
            )


def _why_ray(config: Config, environ: Mapping[str, str]) -> str:
    if config.launch.launcher == "ray":
        return "`--launcher=ray`"
    if config.launch.ray_address is not None:
        return flag_text("ray_address", config.launch.ray_address)
    if config.critic_world_size:
        return "a critic on ranks of its own"
    if config.parallel.world_size > 1:
        return f"starting {config.parallel.world_size} training ranks from one process"
    return f"RAY_ADDRESS={environ.get('RAY_ADDRESS')}"


def _critic_rules(config: Config) -> Iterator[str]:
    ranks, size = config.critic_world_size, config.parallel.model_parallel_size
    if not ranks:
        return
    name = next(name for name in _CRITIC_FLAGS if getattr(config.critic, name) is not None)
    shown = flag_text(name, getattr(config.critic, name))
    if ranks % size:
        yield (
            f"{ranks} ranks of the critic's own ({shown}) must be a multiple of {size}: the critic has the layout of "
            "the student (--tensor-model-parallel-size x --pipeline-model-parallel-size x --context-parallel-size). "
            "Give it more ranks."
        )
    elif config.samples_per_rollout and config.global_batch_size < ranks // size:
        yield (
            f"{config.global_batch_size} samples per optimizer step are too few for {ranks // size} data-parallel "
            f"ranks of the critic ({shown}): each needs one. Give it fewer ranks."
        )


def _teacher_server_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    folder = opd.opd_teacher_serve
    if folder is None:
        for name in ("opd_teacher_num_gpus", "opd_teacher_num_gpus_per_engine"):
            if name in given(opd):
                yield (
                    f"{flag_text(name, getattr(opd, name))} needs `--opd-teacher-serve`: it is about the servers that "
                    "the run starts. Add it, or drop the flag."
                )
        return
    if opd.opd_teacher_num_gpus % opd.opd_teacher_num_gpus_per_engine:
        yield (
            f"{flag_text('opd_teacher_num_gpus', opd.opd_teacher_num_gpus)} must be a multiple of "
            f"{flag_text('opd_teacher_num_gpus_per_engine', opd.opd_teacher_num_gpus_per_engine)}. Change one of them."
        )


def _colocation_rules(config: Config) -> Iterator[str]:
    rollout, parallel = config.rollout, config.parallel
    if not config.launch.colocate or rollout.rollout_engine != "sglang":
        return  # other engines are within a training rank anyway
    per_engine, per_node = rollout.rollout_num_gpus_per_engine, parallel.actor_num_gpus_per_node
    if per_engine > per_node:
        yield (
            f"{flag_text('rollout_num_gpus_per_engine', per_engine)} with `--colocate` must not exceed "
            f"{flag_text('actor_num_gpus_per_node', per_node)}: an engine shares the devices of one machine's training "
            "ranks. Lower it."
        )
    room = parallel.actor_num_nodes * (per_node // per_engine) * per_engine
    if rollout.rollout_num_gpus > room:
        yield (
            f"{flag_text('rollout_num_gpus', rollout.rollout_num_gpus)} with `--colocate` must not exceed {room}: "
            f"that many devices of the {parallel.world_size} training ranks make whole engines. Lower it."
        )


def served_teacher_folder_rules(config: Config) -> Iterator[str]:
    folder = config.opd.opd_teacher_serve
    if folder is None:
        return
    shown = flag_text("opd_teacher_serve", folder)
    if not (Path(folder) / "config.json").is_file():
        yield f"{shown} holds no config.json. Give a complete Hugging Face folder, or a server's address with --rm-url."
    elif not config.output.dry_run and not any(Path(folder).glob("*.safetensors")):
        yield f"{shown} holds no weights (*.safetensors). Give a complete Hugging Face folder."
    if importlib.util.find_spec("sglang") is None and not config.output.dry_run:
        yield f"{shown} needs the `sglang` package, which is not installed. Install it with `pip install sglang`."
