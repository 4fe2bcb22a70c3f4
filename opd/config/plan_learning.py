"""The "Learning" rows of the plan: what is optimised, and by which steps."""

from __future__ import annotations

from opd.config.schema import Config


def learning_rows(config: Config) -> list[tuple[str, str]]:
    algorithm, optimizer = config.algorithm, config.optimizer
    steps, rollouts = config.optimizer_steps_per_rollout, config.rollout.num_rollout or 0
    decay = f", {optimizer.lr_decay_style} to {optimizer.min_lr:g}" if optimizer.lr_decay_style != "constant" else ""
    high = algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high
    return [
        *_loss_rows(config),
        ("task reward", config.reward.rm_type or config.reward.custom_rm_path or "none: the teacher alone"),
        (
            "optimizer steps",
            f"{steps} per rollout of {config.global_batch_size} samples, {steps * rollouts:,} in {rollouts:,} rollouts",
        ),
        (
            "micro-batches",
            f"packed to at most {config.parallel.max_tokens_per_gpu:,} tokens per rank, logits of "
            f"{config.parallel.logits_chunk_tokens:,} at a time",
        ),
        (
            "learning rate",
            f"{optimizer.lr:g} after {optimizer.lr_warmup_iters} warm-up steps{decay}, gradient norm clipped at "
            f"{optimizer.clip_grad:g}",
        ),
        *([("ratio clip", f"[{1 - algorithm.eps_clip:g}, {1 + high:g}]")] if config.policy_weight else []),
    ]


def _loss_rows(config: Config) -> list[tuple[str, str]]:
    rows = []
    if config.policy_weight:
        weight = "" if config.policy_weight == 1 else f"{config.policy_weight:g} x "
        rows.append(("policy loss", f"{weight}{_signal(config)}"))
    if config.distillation.distillation_type is not None:
        rows.append(("distillation loss", _distillation(config)))
    if config.off_policy.sft_data is not None:
        rows.append(("answers from a file", _answers(config)))
    if config.lora.lora_rank is not None:
        rows.append(("trained", f"low-rank adapters of rank {config.lora.lora_rank}; the base weights stay"))
    return rows


def _signal(config: Config) -> str:
    algorithm, opd = config.algorithm, config.opd
    parts = [algorithm.advantage_estimator]
    if config.penalty_coef:
        parts.append(
            f"- {config.penalty_coef:g} x reverse KL to the teacher, both at temperature {config.kl_temperature:g}"
        )
    if opd.opd_kl_clip is not None:
        parts.append(f"(at most {opd.opd_kl_clip:g} nats a token)")
    if opd.opd_kl_discount:
        parts.append(f"(and of the tokens after it, discounted by {opd.opd_kl_discount:g})")
    if algorithm.normalize_advantages:
        parts.append("; whitened " + ("after" if opd.opd_whiten_penalty else "before") + " the penalty")
    if algorithm.kl_coef:
        parts.append(f"; {algorithm.kl_coef:g} x KL to the reference in the reward")
    if algorithm.use_kl_loss:
        parts.append(f"; + {algorithm.kl_loss_coef:g} x KL to the reference ({algorithm.kl_loss_type})")
    return " ".join(parts).replace(" ;", ";")


def _distillation(config: Config) -> str:
    flags = config.distillation
    what = flags.distillation_type
    if what == "gkd":
        what += f" (beta {flags.distillation_beta:g})"
    if what == "custom":
        what = str(flags.custom_divergence_function_path)
    where = "over the whole vocabulary"
    if flags.distillation_top_k is not None:
        who = {"teacher": "the teacher's", "student": "the student's", "union": "both models'"}[
            flags.distillation_support
        ]
        where = f"over {who} {flags.distillation_top_k} likeliest tokens and the rest as one"
    return f"{flags.lambda_distill:g} x {what} {where}, temperature {flags.distillation_temperature:g}"


def _answers(config: Config) -> str:
    flags = config.off_policy
    parts = [f"{flags.sft_data}:"]
    if flags.sft_steps:
        parts.append("all of the first " + ("step" if flags.sft_steps == 1 else f"{flags.sft_steps} steps"))
    if flags.opd_off_policy_fraction:
        parts.append(f"{'then ' if flags.sft_steps else ''}{flags.opd_off_policy_fraction:.0%} of each batch")
    return " ".join(parts)
