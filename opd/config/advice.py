"""Settings that are legal and probably not what was meant: ``warnings`` says so once, at start."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.file_rules import missing_student_weights
from opd.config.flags import flag_text
from opd.config.queries import GROUP_ESTIMATORS, has_task_reward, task_reward_acts
from opd.config.schema import Config
from opd.config.slime_flags import translation_notes
from opd.config.student_support import support_cost
from opd.config.traffic import LIKELY_TOKEN_BYTES

MUCH_TRAFFIC = 10e9  # bytes of a rollout's scores: one core reads as much JSON in about 9 minutes


def warnings(config: Config) -> list[str]:
    """One line each. Call after ``check``: it reads folders that ``check`` found to exist."""
    return list(_warnings(config))


def _warnings(config: Config) -> Iterator[str]:
    yield from _signal_warnings(config)
    yield from _estimator_warnings(config)
    yield from _rollout_warnings(config)
    yield from _traffic_warnings(config)
    yield from _schedule_warnings(config)
    yield from _file_warnings(config)
    yield from translation_notes(config.slime.translated_flags or [])


def _signal_warnings(config: Config) -> Iterator[str]:
    rollout, opd = config.rollout, config.opd
    if opd.use_opd and has_task_reward(config) and not task_reward_acts(config):
        yield (
            "the task reward is measured but teaches nothing: with --n-samples-per-prompt 1 an answer is its own "
            "group's mean, so "
            f"its {config.algorithm.advantage_estimator} advantage is always 0 and only the teacher acts. Give at "
            "least 2 samples per prompt to use both."
        )
    if config.scores_answers and rollout.rollout_temperature != 1:
        served = "a server scores given tokens at temperature 1 whatever it is asked."
        custom = "the function of --opd-custom-teacher-path is to give log-probs at temperature 1."
        yield (
            "the reverse KL is measured at temperature 1 on both sides, although answers are sampled at "
            f"{rollout.rollout_temperature}: {served if opd.opd_type == 'sglang' else custom}"
        )
    if opd.use_opd and opd.opd_kl_coef == 0:
        yield (
            "`--opd-kl-coef=0.0`: the teacher is asked and its reverse KL is logged, but it does not act on the "
            "student."
        )
    if opd.opd_skip_teacher_selftest and opd.opd_type != "custom":
        yield (
            "`--opd-skip-teacher-selftest`: a teacher with another tokenizer would go unnoticed and push the student "
            "at random."
        )


def _estimator_warnings(config: Config) -> Iterator[str]:
    algorithm, opd = config.algorithm, config.opd
    estimator = algorithm.advantage_estimator
    # With a critic or a KL to the reference there is another term in the sum, so the coefficient is heard.
    penalty_alone = not task_reward_acts(config) and estimator != "ppo" and algorithm.kl_coef == 0
    if opd.opd_whiten_penalty and config.penalty_coef > 0 and penalty_alone:
        yield (
            f"`--opd-whiten-penalty` makes {flag_text('opd_kl_coef', opd.opd_kl_coef)} a no-op: with no task reward "
            "that acts every advantage is -coef x KL, and whitening divides by its deviation, coef included. Any "
            "positive coefficient trains alike, at a strength that does not fade as the student reaches the teacher."
        )
    if algorithm.use_kl_loss and algorithm.kl_loss_coef > 0 and algorithm.kl_loss_type in ("k3", "low_var_kl"):
        yield (
            f"{flag_text('kl_loss_type', algorithm.kl_loss_type)}: its gradient is that of the forward KL(reference || "
            "student), although its value estimates KL(student || reference). k2 has the latter's gradient."
        )
    in_groups = estimator in GROUP_ESTIMATORS and estimator != "reinforce_plus_plus_baseline"
    if algorithm.disable_grpo_std_normalization and not in_groups:
        yield (
            f"`--disable-grpo-std-normalization` has no effect with {flag_text('advantage_estimator', estimator)}, "
            "which does not divide by a group's deviation."
        )
    if estimator == "gspo" and algorithm.eps_clip >= 0.1 and config.optimizer_steps_per_rollout > 1:
        yield (
            f"{flag_text('eps_clip', algorithm.eps_clip)} with `--advantage-estimator=gspo` hardly ever clips: the "
            "ratio is the mean of a whole answer, and moves far less than a token's. The "
            "paper (arXiv 2507.18071) has 3e-4 and 4e-4."
        )
    if config.uses_critic and not has_task_reward(config) and algorithm.kl_coef == 0:
        yield (
            "`--advantage-estimator=ppo` without a task reward: the critic learns to predict 0, as the OPD penalty is "
            "no part of what it predicts. grpo does the same without a critic."
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


def _traffic_warnings(config: Config) -> Iterator[str]:
    flags, length = config.distillation, config.plan.plan_response_len or config.rollout.rollout_max_response_len
    top = flags.distillation_top_k
    if config.opd.opd_type != "sglang" or flags.distillation_type is None or top is None:
        return
    if flags.distillation_support == "teacher":
        return
    cost = support_cost(prompt=config.plan.plan_prompt_len or 0, response=length, count=top)
    moved = config.samples_per_rollout * (cost.sent + cost.answered)
    if moved > MUCH_TRAFFIC:
        cheap = config.samples_per_rollout * length * top * LIKELY_TOKEN_BYTES
        yield (
            f"{flag_text('distillation_support', flags.distillation_support)} with a served teacher: about "
            f"{moved / 1e9:,.0f} GB of JSON per rollout with answers of {length:,} tokens, in {cost.requests:,} "
            "requests for each, one after another, and one process reads it. `--distillation-support=teacher` moves "
            f"{cheap / 1e9:,.1f} GB in one request each; a smaller `--distillation-top-k` or shorter answers help too."
        )


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
