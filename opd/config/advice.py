"""Settings that are legal and probably not what was meant: ``warnings`` says so once, at start."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.file_rules import missing_student_weights
from opd.config.flag_rules import has_task_reward
from opd.config.flags import flag_text
from opd.config.schema import Config


def warnings(config: Config) -> list[str]:
    """One line each. Call after ``check``: it reads folders that ``check`` found to exist."""
    return list(_warnings(config))


def _warnings(config: Config) -> Iterator[str]:
    yield from _signal_warnings(config)
    yield from _rollout_warnings(config)
    yield from _schedule_warnings(config)
    yield from _file_warnings(config)


def _signal_warnings(config: Config) -> Iterator[str]:
    rollout, opd = config.rollout, config.opd
    if opd.use_opd and has_task_reward(config) and rollout.n_samples_per_prompt == 1:
        yield (
            "the task reward is measured but teaches nothing: with --n-samples-per-prompt 1 an answer is its own "
            "group's mean, so "
            "its GRPO advantage is always 0 and only the teacher acts. Give at least 2 samples per prompt to use both."
        )
    if opd.opd_type == "sglang" and rollout.rollout_temperature != 1:
        yield (
            "the reverse KL is measured at temperature 1 on both sides, although answers are sampled at "
            f"{rollout.rollout_temperature}: "
            "a server scores given tokens at temperature 1 whatever it is asked."
        )
    if opd.use_opd and opd.opd_kl_coef == 0:
        yield (
            "`--opd-kl-coef=0.0`: the teacher is asked and its reverse KL is logged, but it does not act on the "
            "student."
        )
    if opd.opd_skip_teacher_selftest:
        yield (
            "`--opd-skip-teacher-selftest`: a teacher with another tokenizer would go unnoticed and push the student "
            "at random."
        )


def _rollout_warnings(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.rollout_top_p < 1 or rollout.rollout_top_k != -1:
        yield (
            f"{flag_text('rollout_top_p', rollout.rollout_top_p)} "
            f"{flag_text('rollout_top_k', rollout.rollout_top_k)}: answers come from a "
            "truncated distribution, while recorded and recomputed log-probs are those of the whole one. The reverse "
            "KL "
            "then is no expectation under the student."
        )
    engines = rollout.rollout_num_gpus // rollout.rollout_num_gpus_per_engine
    if rollout.rollout_engine == "torch" and (
        rollout.rollout_num_gpus != 1 or rollout.rollout_num_gpus_per_engine != 1
    ):
        yield (
            "`--rollout-num-gpus` and `--rollout-num-gpus-per-engine` are for `--rollout-engine=sglang`; the torch "
            "engine uses the training ranks."
        )
    if rollout.rollout_engine == "sglang" and engines > config.samples_per_rollout:
        yield f"{engines} SGLang engines for {config.samples_per_rollout} samples per rollout: some stay idle."


def _schedule_warnings(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    steps = (config.rollout.num_rollout or 0) * config.optimizer_steps_per_rollout
    if 0 < steps <= optimizer.lr_warmup_iters:
        yield (
            f"{flag_text('lr_warmup_iters', optimizer.lr_warmup_iters)}: the run has {steps} optimizer steps, so the "
            "warm-up never ends."
        )
    if optimizer.lr_decay_style == "constant" and (optimizer.min_lr > 0 or optimizer.lr_decay_iters is not None):
        yield "`--min-lr` and `--lr-decay-iters` have no effect with `--lr-decay-style=constant`."
    if config.parallel.use_distributed_optimizer and config.parallel.world_size == config.parallel.model_parallel_size:
        yield "`--use-distributed-optimizer` shards over data-parallel ranks, and there is one."


def _file_warnings(config: Config) -> Iterator[str]:
    checkpoint, output = config.checkpoint, config.output
    if checkpoint.save is None:
        yield "no `--save`: the trained weights are lost when the run ends."
    if output.dry_run and output.output_dir is None:
        yield "no `--output-dir`: a run needs it, for metrics and samples."
    if output.dry_run and missing_student_weights(config):
        yield f"{flag_text('hf_checkpoint', checkpoint.hf_checkpoint)} holds no weights: a run would stop here."
    if output.trust_remote_code:
        yield "`--trust-remote-code`: Python code from the model's folder will run."
