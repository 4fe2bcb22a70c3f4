"""Rules between flags that need nothing but the flags: one generator per topic, the worst mistake first."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.algorithm_rules import algorithm_rules
from opd.config.async_rules import async_rules
from opd.config.checkpoint_rules import checkpoint_rules
from opd.config.distillation_rules import distillation_rules
from opd.config.flags import flag_text
from opd.config.launch_rules import launch_flag_rules
from opd.config.layout_rules import layout_rules
from opd.config.lora_rules import lora_rules
from opd.config.mixture_rules import mixture_rules
from opd.config.off_policy_rules import off_policy_rules, written_with_teacher_rules
from opd.config.partial_rules import partial_rules
from opd.config.paths import split_path
from opd.config.queries import OPD_REWARD_MODULE, given, has_task_reward, uses_opd_reward
from opd.config.schema import Config
from opd.config.slime_rules import slime_rules
from opd.config.teacher_rules import opd_rules
from opd.config.teacher_tokenizer_rules import teacher_tokenizer_rules


def flag_rules(config: Config) -> Iterator[str]:
    yield from opd_rules(config)
    yield from teacher_tokenizer_rules(config)
    yield from distillation_rules(config)
    yield from reward_rules(config)
    yield from algorithm_rules(config)
    yield from rollout_rules(config)
    yield from off_policy_rules(config)
    yield from mixture_rules(config)
    yield from written_with_teacher_rules(config)
    yield from partial_rules(config)
    yield from async_rules(config)
    yield from optimizer_rules(config)
    yield from layout_rules(config)
    yield from launch_flag_rules(config)
    yield from eval_rules(config)
    yield from checkpoint_rules(config)
    yield from output_rules(config)
    yield from lora_rules(config)
    yield from slime_rules(config)
    yield from required_rules(config)


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
    custom_advantages = config.algorithm.custom_advantage_function_path is not None
    if not has_task_reward(config) and not config.opd.use_opd and not custom_advantages:
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


def rollout_rules(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.rollout_engine != "sglang":
        for name, value in given(rollout).items():
            if name.startswith("sglang_") or name == "use_sglang_router":
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


def output_rules(config: Config) -> Iterator[str]:
    output = config.output
    if not output.use_wandb:
        for name, value in given(output).items():
            if name.startswith("wandb_"):
                yield f"{flag_text(name, value)} needs `--use-wandb`. Add it, or drop the flag."
    if output.prometheus_host is not None and output.prometheus_port is None:
        yield (
            f"{flag_text('prometheus_host', output.prometheus_host)} needs `--prometheus-port`. Give a free port such "
            "as 9400, or drop the flag."
        )


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
