"""Rules of the distillation losses (--distillation-*, --lambda-*)."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.flags import flag_text
from opd.config.model_facts import ModelFacts
from opd.config.queries import given, task_reward_acts
from opd.config.schema import Config


def distillation_rules(config: Config) -> Iterator[str]:
    flags = config.distillation
    kind = flags.distillation_type
    if kind is None:
        for name, value in given(flags).items():
            yield f"{flag_text(name, value)} has no effect without `--distillation-type`. Add it, or drop the flag."
        return
    if not config.opd.use_opd:
        yield (
            f"{flag_text('distillation_type', kind)} needs `--use-opd`: there is no teacher to learn from. Add it with "
            "--opd-type and a teacher."
        )
    yield from _second_signal_rules(config)
    if "distillation_beta" in given(flags) and kind != "gkd":
        yield (
            f"{flag_text('distillation_beta', flags.distillation_beta)} needs `--distillation-type=gkd` (got `{kind}`)."
            " Change the type, or drop it."
        )
    if "distillation_support" in given(flags) and flags.distillation_top_k is None:
        yield (
            f"{flag_text('distillation_support', flags.distillation_support)} needs `--distillation-top-k`: without it "
            "the whole vocabulary is compared. Give a number of tokens such as 16, or drop it."
        )
    yield from _custom_rules(config)
    yield from _weight_rules(config)
    if config.opd.opd_type == "sglang":
        yield from _server_rules(config)


def _second_signal_rules(config: Config) -> Iterator[str]:
    """The distillation loss takes the place of the penalty, so what shapes the penalty is never heard."""
    for name in ("opd_kl_coef", "opd_student_logprobs"):
        if name in given(config.opd):
            yield (
                f"{flag_text(name, getattr(config.opd, name))} has no effect with "
                f"{flag_text('distillation_type', config.distillation.distillation_type)}: it belongs to the penalty "
                "on the advantage, which the distillation loss replaces. Drop it; --lambda-distill weighs the loss."
            )


def _custom_rules(config: Config) -> Iterator[str]:
    """A divergence of the user's own compares whole distributions, which a co-loaded teacher alone has."""
    flags, opd = config.distillation, config.opd
    path = flags.custom_divergence_function_path
    if flags.distillation_type != "custom":
        if path is not None:
            yield (
                f"{flag_text('custom_divergence_function_path', path)} needs `--distillation-type=custom` (got "
                f"`{flags.distillation_type}`). Change the type, or drop the function."
            )
        return
    if path is None:
        yield (
            "`--distillation-type=custom` needs `--custom-divergence-function-path`. Give the function, such as "
            "my_objectives.hellinger (docs/extending.md)."
        )
    if opd.opd_type == "sglang":
        yield (
            "`--distillation-type=custom` needs `--opd-type=megatron` (got `sglang`): the function compares whole "
            "distributions, and a server gives a few tokens' log-probs. Co-load the teacher with --opd-teacher-load."
        )
    elif flags.distillation_top_k is not None:
        yield (
            f"{flag_text('distillation_top_k', flags.distillation_top_k)} does not go with "
            "`--distillation-type=custom`: the function gets the whole vocabulary. Drop it, and choose tokens in the "
            "function."
        )


def _weight_rules(config: Config) -> Iterator[str]:
    flags, algorithm = config.distillation, config.algorithm
    if config.policy_weight == 0 and flags.lambda_distill == 0:
        yield (
            f"{flag_text('lambda_distill', flags.lambda_distill)} without a positive `--lambda-rl` leaves no loss. "
            "Give one of them a positive weight."
        )
    regularised = (
        (algorithm.use_kl_loss and algorithm.kl_loss_coef > 0) or algorithm.kl_coef > 0 or algorithm.entropy_coef > 0
    )
    if config.policy_weight > 0 and not task_reward_acts(config) and not regularised:
        yield (
            f"{flag_text('lambda_rl', flags.lambda_rl)} weighs a policy loss whose advantages are all 0: there is no "
            "task reward that acts (it needs --rm-type or --custom-rm-path and, with an estimator that compares "
            "answers, at least 2 samples per prompt). Add one, or drop it."
        )


def _server_rules(config: Config) -> Iterator[str]:
    flags = config.distillation
    if flags.distillation_top_k is None:
        yield (
            f"{flag_text('distillation_type', flags.distillation_type)} over the whole vocabulary needs "
            "`--opd-type=megatron` (got `sglang`): over HTTP every token would cost one number per vocabulary entry "
            "(151,936 x 4 bytes for Qwen3, 600 MB per 1,000 tokens). Give `--distillation-top-k`, or co-load the "
            "teacher with --opd-type megatron."
        )
    if flags.distillation_temperature != 1:
        yield (
            f"{flag_text('distillation_temperature', flags.distillation_temperature)} needs `--opd-type=megatron` (got "
            "`sglang`): a server's log-probs are at temperature 1, and to change it one needs the logits of the whole "
            "vocabulary. Leave it out, or co-load the teacher."
        )
    if config.opd.opd_teacher_combine == "probs":
        yield (
            f"{flag_text('distillation_top_k', flags.distillation_top_k)} with `--opd-teacher-combine=probs` needs "
            "`--opd-type=megatron` (got `sglang`): each server sends the log-probs of its own likeliest tokens, and a "
            "mixture needs all teachers' on the same ones. Route the samples, or co-load the teachers."
        )


def distillation_model_rules(config: Config, student: ModelFacts) -> Iterator[str]:
    top_k = config.distillation.distillation_top_k
    if top_k is not None and top_k >= student.vocab_size:
        yield (
            f"{flag_text('distillation_top_k', top_k)} must be less than the {student.vocab_size} tokens of the "
            "vocabulary. Give a few dozen, or leave it out to compare all of it (with a co-loaded teacher)."
        )
