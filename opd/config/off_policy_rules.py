"""Answers that the student did not write alone: those of --sft-data, and those in which a teacher has a hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opd.config.flags import flag_text
from opd.config.mixture_rules import mixing_teacher
from opd.config.queries import given
from opd.config.schema import Config
from opd.config.weight_file_rules import no_such_folder


def off_policy_prompts(config: Config, step: int) -> int:
    """How many of the --rollout-batch-size prompts of ``step`` (from 1) come from --sft-data: all of them in the
    warm-up, then the whole number nearest to --opd-off-policy-fraction of them."""
    if config.off_policy.sft_data is None:
        return 0
    prompts = config.rollout.rollout_batch_size or 0
    return prompts if step <= config.off_policy.sft_steps else _mixed_prompts(config)


def _mixed_prompts(config: Config) -> int:
    return int(config.off_policy.opd_off_policy_fraction * (config.rollout.rollout_batch_size or 0) + 0.5)


def off_policy_rules(config: Config) -> Iterator[str]:
    yield from _answer_rules(config)
    yield from _mixing_rules(config)
    yield from _answer_score_rules(config)
    yield from _speculative_rules(config)


def _answer_rules(config: Config) -> Iterator[str]:
    flags, last = config.off_policy, config.rollout.num_rollout
    if flags.sft_data is None:
        for name, value in given(flags).items():
            yield f"{flag_text(name, value)} needs `--sft-data`. Give the file with the answers, or drop the flag."
        return
    data = flag_text("sft_data", flags.sft_data)
    if flags.sft_steps == 0 and flags.opd_off_policy_fraction == 0:
        yield (
            f"{data} is never used. Give `--sft-steps` for a warm-up on it, `--opd-off-policy-fraction` for a share "
            "of each batch, or both."
        )
    if last is not None and flags.sft_steps > last:
        yield (
            f"{flag_text('sft_steps', flags.sft_steps)} exceeds {flag_text('num_rollout', last)}, which counts the "
            "warm-up's steps too. Lower it, or raise the rollouts."
        )
    if flags.sft_steps > 0 and config.critic.num_critic_only_steps > 0:
        yield (
            f"{flag_text('num_critic_only_steps', config.critic.num_critic_only_steps)} with "
            f"{flag_text('sft_steps', flags.sft_steps)}: both claim the first steps, and the critic learns nothing "
            "from answers without rewards. Drop one of them."
        )


def _mixing_rules(config: Config) -> Iterator[str]:
    fraction, prompts = config.off_policy.opd_off_policy_fraction, config.rollout.rollout_batch_size
    if config.off_policy.sft_data is None or fraction == 0 or prompts is None:
        return
    shown, batch = flag_text("opd_off_policy_fraction", fraction), flag_text("rollout_batch_size", prompts)
    if prompts == 1:
        yield f"{shown} needs more than one prompt per rollout to divide (got {batch}). Raise it, or drop the fraction."
    elif _mixed_prompts(config) == 0:
        yield (
            f"{shown} makes no whole prompt of {batch}: nothing would come from --sft-data. Give at least "
            f"{1 / prompts:.3g}, or raise the prompts."
        )
    elif _mixed_prompts(config) == prompts:
        yield (
            f"{shown} makes {prompts} prompts of {batch}, so the student would write nothing. Give at most "
            f"{1 - 1 / prompts:.3g}, or use `--sft-steps` for steps on --sft-data alone."
        )


def _answer_score_rules(config: Config) -> Iterator[str]:
    """Which loss the answers get: the divergence of a distillation loss, else their log-likelihood."""
    flags, distillation = config.off_policy, config.distillation
    if flags.sft_data is None:
        return
    loss = flag_text("distillation_type", distillation.distillation_type)
    if distillation.distillation_type is None:
        if flags.lambda_sft == 0:
            yield "`--lambda-sft=0.0` leaves the answers of --sft-data without effect. Give 1.0, or drop --sft-data."
        return
    if "lambda_sft" in given(flags):
        yield (
            f"{flag_text('lambda_sft', flags.lambda_sft)} has no effect with {loss}: answers of --sft-data then get "
            "that loss, weighted with --lambda-distill. Drop it."
        )
    if config.opd.opd_type == "sglang" and distillation.distillation_support != "teacher":
        yield (
            f"{flag_text('distillation_support', distillation.distillation_support)} with `--sft-data` and "
            "`--opd-type=sglang`: the server is asked for ids that the rollout engine reported, and it reports none "
            "for answers that it did not write. Give `--distillation-support=teacher`, or drop `--sft-data`."
        )


def _speculative_rules(config: Config) -> Iterator[str]:
    rollout, opd = config.rollout, config.opd
    if rollout.rollout_engine != "speculative_kd":
        if "skd_top_k" in given(rollout):
            yield (
                f"{flag_text('skd_top_k', rollout.skd_top_k)} needs `--rollout-engine=speculative_kd` (got "
                f"`{rollout.rollout_engine}`). Add it, or drop the flag."
            )
        return
    engine = "`--rollout-engine=speculative_kd`"
    if opd.opd_type != "megatron" or opd.opd_teacher_load is None:
        instead = "--opd-teachers" if opd.opd_teachers else "--opd-teacher-self" if opd.opd_teacher_self else None
        got = f"got {instead}" if instead else f"got `{opd.opd_type}`" if opd.opd_type else "--opd-type is not given"
        yield (
            f"{engine} needs `--opd-type=megatron` with one teacher from `--opd-teacher-load` ({got}): the teacher "
            "takes part in writing every token, in this process. Add these, or choose another engine."
        )
    for name in ("opd_teacher_prompt_key", "opd_teacher_prompt_template", "opd_teacher_system_prompt"):
        value = getattr(opd, name)
        if value is not None:
            yield (
                f"{flag_text(name, value)} with {engine}: there the teacher reads the student's prompt. Drop one of "
                "them."
            )


def written_with_teacher_rules(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if not config.written_with_teacher:
        return
    engine = flag_text("rollout_engine", rollout.rollout_engine)
    for name in ("rollout_top_p", "rollout_top_k"):
        if name in given(rollout):
            yield (
                f"{flag_text(name, getattr(rollout, name))} with {engine}: the log-probs of its answers are those of "
                "whole distributions, not of truncated ones. Drop one of them."
            )
    if config.policy_weight != 0 and not config.algorithm.use_tis:
        yield (
            f"{engine} needs `--use-tis` here: a policy gradient (task reward, or the penalty on sampled tokens) "
            "expects tokens from the student alone, and the teacher has a hand in these, so each needs the ratio of "
            "the two probabilities. Add it, or use a distillation loss (--distillation-type), which needs none."
        )


def writing_teacher_file_rules(config: Config) -> Iterator[str]:
    """The engine loads the teacher as a transformers model, beside the trainer's."""
    teacher = mixing_teacher(config)
    flag, name = (
        ("opd_teacher_load", config.opd.opd_teacher_load) if teacher is None else (teacher.flag, teacher.folder)
    )
    if not config.written_with_teacher or name is None:
        return
    folder, shown = Path(name), flag_text(flag, name)
    if not folder.is_dir():
        yield no_such_folder(shown, name)
    elif not (folder / "config.json").is_file():
        yield (
            f"{flag_text('rollout_engine', config.rollout.rollout_engine)} needs a Hugging Face folder in {shown}, "
            "and this is none: the engine decodes with the teacher as a transformers model. Convert a torch_dist "
            "folder with tools/convert_torch_dist_to_hf.py, and give the result."
        )
    elif not any(folder.glob("*.safetensors")) and not config.output.dry_run:
        yield f"{shown} holds config.json but no weights (*.safetensors). Give a complete model folder."
