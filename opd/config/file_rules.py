"""Rules that look at the disk, the installed packages and the launcher, but load nothing heavy."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

from opd.config.access_rules import access_rules
from opd.config.flags import flag_text
from opd.config.launch_rules import launch_environment_rules, served_teacher_folder_rules
from opd.config.off_policy_rules import writing_teacher_file_rules
from opd.config.paths import check_function
from opd.config.schema import Config
from opd.config.teacher_server_rules import teacher_server_file_rules
from opd.config.teachers import TeacherSpec, teachers
from opd.config.weight_file_rules import no_such_folder, weight_file_rules

FUNCTION_FLAGS = (
    "custom_rm_path", "custom_reward_post_process_path", "custom_advantage_function_path", "opd_custom_teacher_path",
    "custom_divergence_function_path",
)  # fmt: skip
LATEST = "latest_checkpointed_iteration.txt"


def file_rules(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    yield from _prompt_file_rules(config)
    yield from _checkpoint_folder_rules(config)
    yield from access_rules(config)
    yield from weight_file_rules(config)
    yield from writing_teacher_file_rules(config)
    yield from _package_rules(config)
    yield from _launcher_rules(config, environ)
    yield from teacher_server_file_rules(config)
    yield from served_teacher_folder_rules(config)
    for name in FUNCTION_FLAGS:
        path = config.flat()[name]
        if path is not None:
            check_function(path, flag=flag_text(name)[1:-1])


def _prompt_file_rules(config: Config) -> Iterator[str]:
    files = [("--prompt-data", str(config.data.prompt_data))]
    files += [("--eval-prompt-data", path) for _, path in config.eval_sets]
    if config.off_policy.sft_data is not None:
        files.append(("--sft-data", config.off_policy.sft_data))
    for flag, name in files:
        path = Path(name)
        if path.is_dir():
            yield f"`{flag}={name}` is a folder, and must be a file. Name the .jsonl or .parquet file in it."
        elif not path.is_file():
            yield f"`{flag}={name}`: no such file. Check the path."
        elif path.suffix not in (".jsonl", ".parquet"):
            yield (
                f"`{flag}={name}`: the name must end in .jsonl or .parquet, which says how to read it. Rename or "
                "convert the file."
            )
        elif path.stat().st_size == 0:
            yield f"`{flag}={name}`: the file is empty. It needs one prompt per row."


def _checkpoint_folder_rules(config: Config) -> Iterator[str]:
    checkpoint, opd = config.checkpoint, config.opd
    folders = {
        "hf_checkpoint": checkpoint.hf_checkpoint,
        "ref_load": checkpoint.ref_load,
        "opd_teacher_hf_checkpoint": opd.opd_teacher_hf_checkpoint,
        "opd_teacher_tokenizer": opd.opd_teacher_tokenizer,
    }
    for name, folder in folders.items():
        if folder is not None and not Path(folder).is_dir():
            yield no_such_folder(flag_text(name, folder), folder)
    written = {"save": checkpoint.save, "output_dir": config.output.output_dir}
    for name, folder in {**written, "opd_teacher_cache": opd.opd_teacher_cache}.items():
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            yield f"{flag_text(name, folder)} is a file, and must be a folder. Give another path."
    if checkpoint.ref_load is not None and not (Path(checkpoint.ref_load) / LATEST).is_file():
        yield (
            f"{flag_text('ref_load', checkpoint.ref_load)} holds no {LATEST}, so it is no torch_dist checkpoint. "
            "Make one with tools/convert_hf_to_torch_dist.py, or leave the flag out to start from --hf-checkpoint."
        )
    yield from _critic_folder_rules(config)
    if missing_student_weights(config) and not config.output.dry_run:
        yield (
            f"{flag_text('hf_checkpoint', checkpoint.hf_checkpoint)} holds no weights (*.safetensors), "
            "and neither --ref-load nor --load does. Give a complete model folder, or a torch_dist folder with "
            "--ref-load."
        )
    if opd.opd_type == "megatron":
        for teacher in teachers(config):
            if teacher.location is not None:
                yield from _teacher_folder_rules(config, teacher, Path(teacher.location))


def _critic_folder_rules(config: Config) -> Iterator[str]:
    load = config.critic.critic_load
    if load is None or has_hf_weights(Path(load)) or (Path(load) / LATEST).is_file():
        return
    if Path(load) == critic_folder(config):  # as with --load: the first checkpoint will go there
        return
    yield (
        f"{flag_text('critic_load', load)} holds neither a checkpoint ({LATEST}) nor Hugging Face weights "
        "(*.safetensors). Check the path, or leave it out to start from the student's weights."
    )


def critic_folder(config: Config) -> Path | None:
    """Where the critic's checkpoints go; None where nothing is saved."""
    if config.critic.critic_save is not None:
        return Path(config.critic.critic_save)
    return None if config.checkpoint.save is None else Path(config.checkpoint.save) / "critic"


def missing_student_weights(config: Config) -> bool:
    checkpoint = config.checkpoint
    whole = config.lora.lora_rank is None  # a checkpoint of adapters holds no base weights
    resumes = checkpoint.load is not None and (Path(checkpoint.load) / LATEST).is_file()
    if checkpoint.ref_load is not None or (whole and resumes):
        return False
    return not has_hf_weights(Path(str(checkpoint.hf_checkpoint)))


def has_hf_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _teacher_folder_rules(config: Config, teacher: TeacherSpec, folder: Path) -> Iterator[str]:
    opd, shown = config.opd, teacher.shown
    if not folder.is_dir():
        yield no_such_folder(shown, str(teacher.location))
        return
    is_torch_dist = (folder / LATEST).is_file()
    if not is_torch_dist and not (folder / "config.json").is_file():
        yield (
            f"{shown} holds neither {LATEST} (torch_dist) nor config.json (Hugging Face). Give the teacher's "
            "checkpoint folder; "
            "tools/convert_hf_to_torch_dist.py makes the former."
        )
    if not is_torch_dist and not has_hf_weights(folder) and not config.output.dry_run:
        yield f"{shown} holds config.json but no weights (*.safetensors). Give a complete model folder."
    if opd.opd_teacher_ckpt_step is None:
        return
    step = flag_text("opd_teacher_ckpt_step", opd.opd_teacher_ckpt_step)
    if not is_torch_dist:
        yield f"{step} needs a torch_dist teacher, and {shown} is a Hugging Face folder, which has no steps. Drop it."
    iteration = f"iter_{opd.opd_teacher_ckpt_step:07d}"
    if not (folder / iteration).is_dir():
        found = sorted(
            path.name for path in folder.iterdir() if path.is_dir() and path.name.startswith(("iter_", "release"))
        )
        there = f"it has {', '.join(found)}" if found else "it has no step at all"
        yield f"{step}: {shown} has no {iteration}: {there}. Choose an existing step."


def _package_rules(config: Config) -> Iterator[str]:
    needed = {
        "use_wandb": (config.output.use_wandb, "wandb"),
        "prometheus_port": (config.output.prometheus_port is not None, "prometheus_client"),
        "rollout_engine": (config.rollout.rollout_engine == "sglang", "sglang"),
        "use_sglang_router": (config.rollout.use_sglang_router, "sglang_router"),
    }
    for name, (wanted, package) in needed.items():
        if wanted and importlib.util.find_spec(package) is None:
            value = getattr(config.rollout, name, None)
            yield (
                f"{flag_text(name, value)} needs the `{package}` package, which is not installed. Install it with "
                f"`pip install {package}`, or drop the flag."
            )


def _launcher_rules(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    variable = config.opd.opd_teacher_api_key_env
    if variable is not None and not environ.get(variable):
        yield (
            f"{flag_text('opd_teacher_api_key_env', variable)}: that environment variable is not set. Export it, or "
            "drop the flag."
        )
    if config.output.dry_run:
        return  # a plan for eight devices may be made on a laptop
    yield from launch_environment_rules(config, environ)
