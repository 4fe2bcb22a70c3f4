"""Rules between flags that need nothing but the flags: one generator per topic, the worst mistake first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

from opd.config.flags import flag_text
from opd.config.paths import split_path
from opd.config.schema import Config

OPD_REWARD_MODULE = "opd.rewards.on_policy_distillation"


def flag_rules(config: Config) -> Iterator[str]:
    yield from opd_rules(config)
    yield from reward_rules(config)
    yield from algorithm_rules(config)
    yield from rollout_rules(config)
    yield from optimizer_rules(config)
    yield from layout_rules(config)
    yield from eval_rules(config)
    yield from checkpoint_rules(config)
    yield from output_rules(config)
    yield from required_rules(config)


def given(section: Any) -> dict[str, Any]:
    """The flags of a section whose values differ from their defaults."""
    return {f.name: getattr(section, f.name) for f in fields(section) if getattr(section, f.name) != f.default}


def opd_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    if not opd.use_opd:
        for name, value in given(opd).items():
            yield f"{flag_text(name, value)} has no effect without `--use-opd`. Add `--use-opd`, or drop it."
        return
    if opd.opd_type is None:
        yield (
            "`--use-opd` needs `--opd-type`. Give `--opd-type=megatron` (teacher in the trainer's process, "
            "--opd-teacher-load) or `--opd-type=sglang` (teacher in its own server, --rm-url)."
        )
    elif opd.opd_type == "megatron":
        yield from _megatron_teacher_rules(config)
    else:
        yield from _sglang_teacher_rules(config)


def _megatron_teacher_rules(config: Config) -> Iterator[str]:
    if config.opd.opd_teacher_load is None:
        yield "`--opd-type=megatron` needs `--opd-teacher-load`. Give the teacher's folder, torch_dist or Hugging Face."
    if config.reward.rm_url is not None:
        yield (
            f"{flag_text('rm_url', config.reward.rm_url)} needs `--opd-type=sglang` (got `megatron`). "
            "With megatron the teacher is co-loaded from --opd-teacher-load: drop `--rm-url`."
        )
    for name in ("opd_teacher_timeout", "opd_teacher_retries", "opd_teacher_concurrency", "opd_teacher_api_key_env"):
        if name in given(config.opd):
            yield (
                f"{flag_text(name, getattr(config.opd, name))} needs `--opd-type=sglang` (got `megatron`): "
                "a co-loaded teacher is not asked over HTTP. Drop it."
            )


def _sglang_teacher_rules(config: Config) -> Iterator[str]:
    for name in ("opd_teacher_load", "opd_teacher_ckpt_step"):
        value = getattr(config.opd, name)
        if value is not None:
            yield (
                f"{flag_text(name, value)} needs `--opd-type=megatron` (got `sglang`). With sglang the teacher runs in "
                f"its own server: pass its address with `--rm-url` and drop `{flag_text(name)[1:-1]}`."
            )
    url = config.reward.rm_url
    if url is None:
        yield (
            "`--opd-type=sglang` needs `--rm-url`. Give the teacher server's address, such as "
            "http://127.0.0.1:13141/generate."
        )
    elif not _is_generate_url(url):
        yield (
            f"{flag_text('rm_url', url)} must be an http or https address that ends in /generate. "
            "Give the teacher server's address, such as http://127.0.0.1:13141/generate."
        )


def _is_generate_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port  # raises on a port that is no number
    except ValueError:
        return False
    known = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
    return known and parts.path.endswith("/generate") and not parts.query and not parts.fragment


def uses_opd_reward(config: Config) -> bool:
    """Whether --custom-rm-path is the teacher's own function, slime's way to ask for teacher scores."""
    path = config.reward.custom_rm_path
    return path is not None and split_path(path, flag="--custom-rm-path")[0] == OPD_REWARD_MODULE


def has_task_reward(config: Config) -> bool:
    return config.reward.rm_type is not None or (
        config.reward.custom_rm_path is not None and not uses_opd_reward(config)
    )


def reward_rules(config: Config) -> Iterator[str]:
    reward = config.reward
    for name in ("custom_rm_path", "custom_reward_post_process_path"):
        path = getattr(reward, name)
        if path is None or split_path(path, flag=flag_text(name)[1:-1])[0] != OPD_REWARD_MODULE:
            continue
        if config.opd.opd_type != "sglang":
            got = f"got `{config.opd.opd_type}`" if config.opd.opd_type else "it is not given"
            yield (
                f"{flag_text(name, path)} needs `--use-opd --opd-type=sglang` ({got}): it asks the teacher's server. "
                "Add these with --rm-url, or drop it."
            )
    if reward.rm_url is not None and not config.opd.use_opd:
        yield (
            f"{flag_text('rm_url', reward.rm_url)} needs `--use-opd --opd-type=sglang`: it is the teacher's address. "
            "Add these, or drop it."
        )
    if not has_task_reward(config) and not config.opd.use_opd:
        yield (
            "nothing to learn from: there is no task reward and no teacher. Give `--rm-type` or `--custom-rm-path` "
            "for a "
            "task reward, or `--use-opd` for a teacher."
        )
    if reward.rm_type is not None and reward.custom_rm_path is not None and not uses_opd_reward(config):
        yield (
            f"{flag_text('rm_type', reward.rm_type)} and {flag_text('custom_rm_path', reward.custom_rm_path)} are two "
            "task "
            "rewards, and a sample has one. Drop one of them."
        )
    if reward.rm_type is not None and config.data.label_key is None:
        yield (
            f"{flag_text('rm_type', reward.rm_type)} needs `--label-key`: it compares answers with a reference. Give "
            "the field that holds it."
        )


def algorithm_rules(config: Config) -> Iterator[str]:
    algorithm, rollout = config.algorithm, config.rollout
    high = algorithm.eps_clip_high
    if high is not None and high < algorithm.eps_clip:
        yield (
            f"{flag_text('eps_clip_high', high)} must not be below {flag_text('eps_clip', algorithm.eps_clip)}: "
            "likelier tokens would be clipped sooner than unlikelier ones. Raise it, or leave it out for a symmetric "
            "clip."
        )
    if rollout.n_samples_per_prompt == 1 and not config.opd.use_opd:
        yield (
            "`--n-samples-per-prompt=1` with `--advantage-estimator=grpo` leaves no gradient: an answer is compared "
            "with its "
            "group's mean, and alone it is the mean. Give at least 2, or add a teacher with `--use-opd`."
        )
    if (
        config.opd.use_opd
        and config.opd.opd_kl_coef == 0
        and (not has_task_reward(config) or rollout.n_samples_per_prompt == 1)
    ):
        yield (
            "`--opd-kl-coef=0.0` leaves no gradient here: the teacher has no weight, and there is no task reward "
            "that could "
            "act (it needs --rm-type or --custom-rm-path, and at least 2 samples per prompt). Give a positive "
            "coefficient."
        )
    total = config.samples_per_rollout
    if algorithm.global_batch_size and total and total % algorithm.global_batch_size:
        yield (
            f"{flag_text('global_batch_size', algorithm.global_batch_size)} must divide the {total} samples of a "
            "rollout "
            f"(--rollout-batch-size {rollout.rollout_batch_size} x --n-samples-per-prompt "
            f"{rollout.n_samples_per_prompt}). "
            f"Give {_largest_divisor(total, algorithm.global_batch_size)}, or leave it out for one optimizer step per "
            "rollout."
        )


def _largest_divisor(total: int, limit: int) -> int:
    return next(n for n in range(min(limit, total), 0, -1) if total % n == 0)


def rollout_rules(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.rollout_engine != "sglang":
        for name, value in given(rollout).items():
            if name.startswith("sglang_"):
                yield (
                    f"{flag_text(name, value)} needs `--rollout-engine=sglang` (got `{rollout.rollout_engine}`). Add "
                    "it, or drop the flag."
                )
    elif rollout.rollout_num_gpus % rollout.rollout_num_gpus_per_engine:
        yield (
            f"{flag_text('rollout_num_gpus', rollout.rollout_num_gpus)} must be a multiple of "
            f"{flag_text('rollout_num_gpus_per_engine', rollout.rollout_num_gpus_per_engine)}. Change one of them."
        )
    for token_id in rollout.rollout_stop_token_ids or []:
        if token_id < 0:
            yield (
                f"{flag_text('rollout_stop_token_ids', rollout.rollout_stop_token_ids)}: {token_id} is no token id. "
                "Give ids from 0 up."
            )


def optimizer_rules(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"{flag_text('min_lr', optimizer.min_lr)} must not exceed {flag_text('lr', optimizer.lr)}: the rate "
            "decays from --lr to "
            "--min-lr. Lower it."
        )
    decay = optimizer.lr_decay_iters
    if decay is not None and decay <= optimizer.lr_warmup_iters:
        yield (
            f"{flag_text('lr_decay_iters', decay)} must be greater than "
            f"{flag_text('lr_warmup_iters', optimizer.lr_warmup_iters)}: "
            "it counts the warm-up's steps too. Raise it, or shorten the warm-up."
        )


def layout_rules(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.world_size % parallel.model_parallel_size:
        yield (
            f"{parallel.world_size} training ranks (--actor-num-nodes {parallel.actor_num_nodes} x "
            "--actor-num-gpus-per-node "
            f"{parallel.actor_num_gpus_per_node}) must be a multiple of {parallel.model_parallel_size} "
            f"(--tensor-model-parallel-size {parallel.tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{parallel.pipeline_model_parallel_size} x --context-parallel-size {parallel.context_parallel_size}). "
            "Add ranks, or lower a parallel size."
        )
    else:
        replicas = parallel.world_size // parallel.model_parallel_size
        if config.samples_per_rollout and config.global_batch_size < replicas:
            name = "global_batch_size" if config.algorithm.global_batch_size else "rollout_batch_size"
            yield (
                f"{config.global_batch_size} samples per optimizer step are too few for {replicas} data-parallel "
                "ranks: each needs "
                f"one. Raise {flag_text(name)}, or start fewer ranks."
            )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            "`--sequence-parallel` needs `--tensor-model-parallel-size` of at least 2: it shards over that group. "
            "Raise the size, or drop it."
        )
    yield from _recompute_rules(config)


def _recompute_rules(config: Config) -> Iterator[str]:
    parallel = config.parallel
    extras = {"recompute_method": parallel.recompute_method, "recompute_num_layers": parallel.recompute_num_layers}
    if parallel.recompute_granularity == "full":
        for name, value in extras.items():
            if value is None:
                yield (
                    f"`--recompute-granularity=full` needs {flag_text(name)}. Give `--recompute-method=uniform "
                    "--recompute-num-layers=1`."
                )
    else:
        for name, value in extras.items():
            if value is not None:
                got = f"got `{parallel.recompute_granularity}`" if parallel.recompute_granularity else "it is not given"
                yield (
                    f"{flag_text(name, value)} needs `--recompute-granularity=full` ({got}). Add it, or drop the flag."
                )


def eval_rules(config: Config) -> Iterator[str]:
    evaluation = config.eval
    sets = evaluation.eval_prompt_data
    if evaluation.eval_interval is not None and sets is None:
        yield (
            f"{flag_text('eval_interval', evaluation.eval_interval)} needs `--eval-prompt-data`. Give a file or NAME "
            "PATH pairs."
        )
    if sets is not None and evaluation.eval_interval is None:
        yield (
            f"{flag_text('eval_prompt_data', sets)} needs `--eval-interval`. Give the number of rollouts between "
            "evaluations."
        )
    if sets is None:
        return
    if len(sets) > 1 and len(sets) % 2:
        yield (
            f"{flag_text('eval_prompt_data', sets)} has {len(sets)} words, and NAME PATH pairs have an even number. "
            "Give one PATH, or a name before each path."
        )
    names = sets[::2] if len(sets) > 1 else []
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"{flag_text('eval_prompt_data', sets)} names `{name}` twice, and metrics carry the name. Rename one."
    if not has_task_reward(config):
        yield (
            f"{flag_text('eval_prompt_data', sets)} needs a task reward to judge answers with. Give `--rm-type` with "
            "--label-key, "
            "or `--custom-rm-path`."
        )
    if evaluation.n_samples_per_eval_prompt > 1 and evaluation.eval_temperature == 0:
        yield (
            f"{flag_text('n_samples_per_eval_prompt', evaluation.n_samples_per_eval_prompt)} with "
            "`--eval-temperature=0.0` "
            "writes the same greedy answer each time. Give a temperature above 0, or 1 sample."
        )


def checkpoint_rules(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.save_interval is not None and checkpoint.save is None:
        yield f"{flag_text('save_interval', checkpoint.save_interval)} needs `--save`. Give the folder for checkpoints."
    if checkpoint.load is None:
        for name in ("finetune", "no_load_optim", "no_load_rng"):
            if getattr(checkpoint, name):
                yield f"{flag_text(name)} needs `--load`. Give the checkpoint folder, or drop it."


def output_rules(config: Config) -> Iterator[str]:
    output = config.output
    if not output.use_wandb:
        for name, value in given(output).items():
            if name.startswith("wandb_"):
                yield f"{flag_text(name, value)} needs `--use-wandb`. Add it, or drop the flag."


def required_rules(config: Config) -> Iterator[str]:
    required = {
        "hf_checkpoint": (config.checkpoint.hf_checkpoint, "the student's Hugging Face folder"),
        "prompt_data": (config.data.prompt_data, "a JSONL or parquet file of prompts"),
        "num_rollout": (config.rollout.num_rollout, "the number of rollouts in the run"),
        "rollout_batch_size": (config.rollout.rollout_batch_size, "the number of prompts per rollout"),
    }
    if not config.output.dry_run:
        required["output_dir"] = (config.output.output_dir, "the folder for metrics and samples")
    for name, (value, what) in required.items():
        if value is None:
            yield f"{flag_text(name)} is required: {what}. Add it."
