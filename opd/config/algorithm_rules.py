"""Rules of the estimator, its losses, its critic and the OPD penalty: what would do nothing, or not what it says."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.flags import flag_text
from opd.config.queries import GROUP_ESTIMATORS, given, task_reward_acts
from opd.config.schema import Config

REWARD_KL_ESTIMATORS = ("ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")  # those that take --kl-coef
SURROGATE_ESTIMATORS = ("grpo", *REWARD_KL_ESTIMATORS)  # those whose loss is PPO's clipped surrogate


def algorithm_rules(config: Config) -> Iterator[str]:
    yield from _clip_rules(config)
    yield from _estimator_rules(config)
    yield from _null_gradient_rules(config)
    yield from _batch_rules(config)
    yield from _reference_rules(config)
    yield from _importance_rules(config)
    yield from _critic_rules(config)
    yield from _unweighted_policy_rules(config)
    if config.opd.use_opd:
        yield from _penalty_rules(config)
        yield from _behaviour_rules(config)


def _clip_rules(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    high = algorithm.eps_clip_high
    if high is not None and high < algorithm.eps_clip:
        yield (
            f"{flag_text('eps_clip_high', high)} must not be below {flag_text('eps_clip', algorithm.eps_clip)}: "
            "likelier tokens would be clipped sooner than unlikelier ones. Raise it, or leave it out for a symmetric "
            "clip."
        )
    if algorithm.eps_clip_c is not None and algorithm.advantage_estimator not in SURROGATE_ESTIMATORS:
        yield (
            f"{flag_text('eps_clip_c', algorithm.eps_clip_c)} has no effect with {_estimator(config)}: dual clip "
            "bounds PPO's surrogate (grpo, ppo, reinforce_plus_plus, reinforce_plus_plus_baseline). Drop it."
        )


def _estimator_rules(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    estimator = algorithm.advantage_estimator
    if estimator.startswith("reinforce_plus_plus") and not algorithm.normalize_advantages:
        yield (
            f"{_estimator(config)} needs `--normalize-advantages`: its advantages are whitened over the batch. Add it."
        )
    for name, users in (("gamma", ("ppo", "reinforce_plus_plus")), ("lambd", ("ppo",))):
        value = getattr(algorithm, name)
        if name in given(algorithm) and estimator not in users:
            yield (
                f"{flag_text(name, value)} has no effect with {_estimator(config)}: it is for "
                f"{' and '.join(users)}. Drop it."
            )


def _null_gradient_rules(config: Config) -> Iterator[str]:
    if config.algorithm.custom_advantage_function_path is not None:
        return  # the function may make an advantage of anything
    opd, estimator = config.opd, config.algorithm.advantage_estimator
    if config.rollout.n_samples_per_prompt == 1 and not opd.use_opd and estimator in GROUP_ESTIMATORS:
        yield (
            f"`--n-samples-per-prompt=1` with {_estimator(config)} leaves no gradient: an answer is compared "
            "with its "
            "group's mean, and alone it is the mean. Give at least 2, or add a teacher with `--use-opd`."
        )
    penalised = opd.use_opd and config.distillation.distillation_type is None
    if penalised and opd.opd_kl_coef == 0 and not task_reward_acts(config) and config.off_policy.sft_data is None:
        samples = ", and at least 2 samples per prompt" if estimator in GROUP_ESTIMATORS else ""
        yield (
            "`--opd-kl-coef=0.0` leaves no gradient here: the teacher has no weight, and there is no task reward "
            f"that could act (it needs --rm-type or --custom-rm-path{samples}). Give a positive coefficient."
        )


def _batch_rules(config: Config) -> Iterator[str]:
    algorithm, rollout, total = config.algorithm, config.rollout, config.samples_per_rollout
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


def _reference_rules(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.use_kl_loss:
        if algorithm.kl_loss_type == "k1" and algorithm.kl_loss_coef != 0:
            yield (
                f"`--kl-loss-type=k1` with {flag_text('kl_loss_coef', algorithm.kl_loss_coef)} has zero expected "
                "gradient: back-propagated, log s - log ref pulls nowhere, whatever the reference. Give "
                "`--kl-loss-type=k2`, use the KL as a reward with `--kl-coef`, or set `--kl-loss-coef=0` to report it."
            )
    else:
        for name in ("kl_loss_coef", "kl_loss_type"):
            if name in given(algorithm):
                yield (
                    f"{flag_text(name, getattr(algorithm, name))} needs `--use-kl-loss`: without it no KL loss is "
                    "computed. Add it, or drop the flag."
                )
    if algorithm.kl_coef != 0 and algorithm.advantage_estimator not in REWARD_KL_ESTIMATORS:
        yield (
            f"{flag_text('kl_coef', algorithm.kl_coef)} has no effect with {_estimator(config)}, whose reward is one "
            f"number per answer: it is for {', '.join(REWARD_KL_ESTIMATORS)}. Use `--use-kl-loss --kl-loss-coef` "
            "instead."
        )


def _importance_rules(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    if not config.weighs_importance:
        for name in ("tis_clip", "tis_clip_low"):
            if name in given(algorithm):
                yield f"{flag_text(name, getattr(algorithm, name))} needs `--use-tis`. Add it, or drop the flag."
    elif algorithm.tis_clip_low > algorithm.tis_clip:
        yield (
            f"{flag_text('tis_clip_low', algorithm.tis_clip_low)} must not exceed "
            f"{flag_text('tis_clip', algorithm.tis_clip)}: a weight lies between them. Lower it."
        )


def _critic_rules(config: Config) -> Iterator[str]:
    critic, last = config.critic, config.rollout.num_rollout
    if not config.uses_critic:
        for name, value in given(critic).items():
            yield (
                f"{flag_text(name, value)} needs `--advantage-estimator=ppo` (got "
                f"`{config.algorithm.advantage_estimator}`): only it has a critic. Drop the flag, or change the "
                "estimator."
            )
    elif last is not None and critic.num_critic_only_steps >= last:
        yield (
            f"{flag_text('num_critic_only_steps', critic.num_critic_only_steps)} must be below "
            f"{flag_text('num_rollout', last)}: the student would never be trained. Lower it, or raise the rollouts."
        )


def _unweighted_policy_rules(config: Config) -> Iterator[str]:
    """What belongs to the policy loss does nothing beside a distillation loss that replaces it."""
    if config.policy_weight != 0:
        return
    unheard = {n: v for n, v in given(config.algorithm).items() if n in _POLICY_LOSS_FLAGS}
    if config.uses_critic:
        unheard["advantage_estimator"] = "ppo"
    for name, value in unheard.items():
        yield (
            f"{flag_text(name, value)} has no effect: the policy loss has no weight beside "
            f"{flag_text('distillation_type', config.distillation.distillation_type)}. Give `--lambda-rl=1` for both "
            "losses, or drop it."
        )


_POLICY_LOSS_FLAGS = (
    "use_kl_loss", "kl_coef", "entropy_coef", "use_tis", "eps_clip_c", "custom_advantage_function_path",
)  # fmt: skip


def _penalty_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    if config.distillation.distillation_type is not None:
        for name in ("opd_kl_clip", "opd_kl_discount", "opd_whiten_penalty"):
            if name in given(opd):
                yield (
                    f"{flag_text(name, getattr(opd, name))} has no effect with "
                    f"{flag_text('distillation_type', config.distillation.distillation_type)}: it shapes the penalty "
                    "on the advantage, which the distillation loss replaces. Drop one of them."
                )
    elif opd.opd_whiten_penalty and not config.algorithm.normalize_advantages:
        yield (
            "`--opd-whiten-penalty` needs `--normalize-advantages`: without it nothing is whitened. Add it, or drop "
            "the flag."
        )


def _behaviour_rules(config: Config) -> Iterator[str]:
    """With behaviour log-probs the student's side of the KL is what the rollout engine says it sampled from."""
    opd, rollout = config.opd, config.rollout
    if opd.opd_student_logprobs != "behaviour":
        return
    remedy = "Drop it to use the recomputed ones"
    if config.scores_answers and rollout.rollout_temperature != 1:
        yield (
            f"`--opd-student-logprobs=behaviour` with `--opd-type={opd.opd_type}` needs `--rollout-temperature=1` (got "
            f"{rollout.rollout_temperature}): the rollout engine's log-probs are at the sampling temperature, the "
            "teacher's at 1, and so the KL between a model and itself would not be 0. "
            f"{remedy}, or sample at 1."
        )
    for name in ("rollout_top_p", "rollout_top_k"):
        if name in given(rollout):
            yield (
                f"`--opd-student-logprobs=behaviour` with {flag_text(name, getattr(rollout, name))}: answers come from "
                "a truncated distribution, and the engine's log-probs are not that one's. Drop one of them."
            )
    if config.written_with_teacher:
        yield (
            f"`--opd-student-logprobs=behaviour` with {flag_text('rollout_engine', rollout.rollout_engine)}: a teacher "
            f"has a hand in every token, so the engine's log-probs are not the student's. {remedy}."
        )


def _estimator(config: Config) -> str:
    return flag_text("advantage_estimator", config.algorithm.advantage_estimator)
