"""The interval each number must lie in, and what to give instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from opd.config.flags import flag_text
from opd.config.schema import Config


@dataclass(frozen=True)
class Interval:
    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)  # NaN fails both comparisons

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'greater than' if self.low_open else 'at least'} {self.low:g}"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"


_ONE_OR_MORE = Interval(1)
_ZERO_OR_MORE = Interval(0)
_POSITIVE = Interval(0, low_open=True)
_BELOW_ONE = Interval(0, 1, high_open=True)
_SHARE = Interval(0, 1)
_NUCLEUS = Interval(0, 1, low_open=True)

# flag -> (interval, remedy)
INTERVALS: dict[str, tuple[Interval, str]] = {
    "opd_kl_coef": (
        _ZERO_OR_MORE,
        "A negative weight would push the student away from the teacher: give 1.0, or 0 for task reward only.",
    ),
    "opd_kl_clip": (_POSITIVE, "It is in nats: give 5, or leave it out."),
    "opd_kl_discount": (_SHARE, "Give 0 for a token's own KL alone, or 1 for all that follows."),
    "opd_teacher_ema_decay": (_BELOW_ONE, "At 1 the teacher never moves: that is `--opd-teacher-self=frozen`."),
    "opd_min_token_coverage": (_SHARE, "It is a share of the tokens: give 0.9, or 0 to never stop."),
    "opd_max_unscored_share": (
        _SHARE,
        "It is a share of the samples: 0.5 stops a run when half of them have no teacher score.",
    ),
    "opd_teacher_timeout": (_POSITIVE, "It is in seconds: give 60."),
    "opd_teacher_retries": (_ZERO_OR_MORE, "Give 0 to mask a sample after its first failed request."),
    "opd_teacher_deadline": (_POSITIVE, "It is in seconds: give 300."),
    "opd_teacher_wait": (_ZERO_OR_MORE, "It is in seconds: give 600, or 0 to stop at once."),
    "opd_teacher_concurrency": (_ONE_OR_MORE, "Give the number of scoring requests in flight, such as 64."),
    "opd_teacher_batch": (_ONE_OR_MORE, "Give 64, or 1 to send each sample by itself."),
    "opd_teacher_cache_gb": (_POSITIVE, "Give the gigabytes that the scores may take, such as 10."),
    "opd_teacher_ckpt_step": (
        _ZERO_OR_MORE,
        "Give the number of an iter_NNNNNNN folder, or leave it out for the latest.",
    ),
    "distillation_beta": (_SHARE, "Give 0.5, or 0 for the forward and 1 for the reverse KL."),
    "distillation_temperature": (_POSITIVE, "Give 1.0."),
    "distillation_top_k": (_ONE_OR_MORE, "Give a few dozen tokens, or leave it out to compare the whole vocabulary."),
    "lambda_rl": (_ZERO_OR_MORE, "Give 1.0, or leave it out for distillation only."),
    "lambda_distill": (
        _ZERO_OR_MORE,
        "A negative weight would push the student away from the teacher: give 1.0, or 0 for the policy loss only.",
    ),
    "num_rollout": (_ONE_OR_MORE, "Give the number of rollouts in the whole run."),
    "rollout_batch_size": (_ONE_OR_MORE, "Give the number of prompts per rollout."),
    "n_samples_per_prompt": (_ONE_OR_MORE, "Give the number of answers per prompt."),
    "rollout_max_response_len": (_ONE_OR_MORE, "Give the tokens per answer."),
    "rollout_max_context_len": (Interval(2), "Leave room for a prompt and an answer."),
    "rollout_max_prompt_len": (_ONE_OR_MORE, "Give the tokens of the longest prompt to keep."),
    "skd_top_k": (_ONE_OR_MORE, "Give the teacher's likeliest tokens that a proposal may be among: 25."),
    "mixture_fixed_alpha": (_SHARE, "Give 0 for the student alone, 1 for the teacher alone."),
    "mixture_schedule_steps": (Interval(2), "A schedule has a first and a last rollout: give 2 or more."),
    "mixture_draft_tokens": (_ONE_OR_MORE, "Give the tokens per draft, such as 4, or leave it out to adapt it."),
    "sft_steps": (_ZERO_OR_MORE, "Give 0 for no warm-up."),
    "opd_off_policy_fraction": (
        _BELOW_ONE,
        "It is a share of each batch; steps on --sft-data alone are `--sft-steps`.",
    ),
    "lambda_sft": (_ZERO_OR_MORE, "A negative weight would push the student away from the answers: give 1.0."),
    "rollout_temperature": (
        _POSITIVE,
        "At 0 the student always writes its likeliest token, whose log-prob says nothing about its distribution: "
        "give 1.0.",
    ),
    "rollout_top_p": (_NUCLEUS, "Give 1.0 to turn nucleus sampling off."),
    "rollout_seed": (_ZERO_OR_MORE, "Sampling noise is keyed by it, as a number without a sign: give 42."),
    "rollout_max_running_requests": (_ONE_OR_MORE, "Give the answers decoded at the same time."),
    "rollout_num_gpus": (_ONE_OR_MORE, "Give the devices for SGLang engines."),
    "rollout_num_gpus_per_engine": (_ONE_OR_MORE, "Give the tensor-parallel size of one SGLang engine."),
    "sglang_server_timeout": (_POSITIVE, "It is in seconds: give 1800."),
    "sglang_request_timeout": (_POSITIVE, "It is in seconds: give 14400."),
    "sglang_mem_fraction_static": (
        Interval(0, 1, low_open=True, high_open=True),
        "It is a share of the device's memory: give 0.7.",
    ),
    "sglang_max_restarts": (_ZERO_OR_MORE, "Give 0 to stop the run when an engine dies."),
    "sglang_port": (Interval(1, 65535), "Leave it out for a free port."),
    "async_max_staleness": (_ZERO_OR_MORE, "It is in rollouts: give 1, or 0 for the synchronous order."),
    "partial_rollout_tokens": (_ONE_OR_MORE, "Give a quarter of --rollout-max-response-len, or leave it out for that."),
    "over_sampling_batch_size": (_ONE_OR_MORE, "Give more than --rollout-batch-size, or leave it out."),
    "max_logprob_mismatch": (_POSITIVE, "It is in nats: give 0.1."),
    "global_batch_size": (
        _ONE_OR_MORE,
        "Give the samples per optimizer step, or leave it out for all samples of a rollout.",
    ),
    "num_steps_per_rollout": (_ONE_OR_MORE, "Give the optimizer steps per rollout, or leave it out for one."),
    "eps_clip": (_BELOW_ONE, "The ratio is kept above 1 - eps: give 0.2."),
    "eps_clip_high": (_ZERO_OR_MORE, "The ratio is kept below 1 + eps: give 0.28, or leave it out."),
    "eps_clip_c": (
        Interval(1, low_open=True),
        "At 1 or below it would cut the gradient of a ratio that has not moved: give 3.0, or leave it out.",
    ),
    "gamma": (_NUCLEUS, "Give 1.0 for no discount."),
    "lambd": (_SHARE, "Give 1.0 for an advantage that does not trust the critic, less for less variance."),
    "kl_coef": (_ZERO_OR_MORE, "A negative weight would push the student away from the reference model: give 0.01."),
    "kl_loss_coef": (
        _ZERO_OR_MORE,
        "A negative weight would push the student away from the reference model: give 0.01, or 0 to report the KL.",
    ),
    "entropy_coef": (_ZERO_OR_MORE, "It weighs a bonus: give 0.01, or 0 for none."),
    "tis_clip": (_POSITIVE, "Give 2.0."),
    "tis_clip_low": (_ZERO_OR_MORE, "Give 0 for no bound from below."),
    "critic_lr": (_POSITIVE, "Give a learning rate such as 1e-5, or leave it out for --lr."),
    "critic_lr_warmup_iters": (_ZERO_OR_MORE, "Give 0 for no warm-up."),
    "num_critic_only_steps": (_ZERO_OR_MORE, "Give 0 to train both from the start."),
    "value_clip": (_POSITIVE, "It is in units of reward: give 0.2."),
    "lr": (_POSITIVE, "Give a learning rate such as 1e-6."),
    "min_lr": (_ZERO_OR_MORE, "Give the learning rate at the end of the decay, or leave it out."),
    "lr_warmup_iters": (_ZERO_OR_MORE, "Give 0 for no warm-up."),
    "lr_decay_iters": (_ONE_OR_MORE, "Leave it out to decay over the whole run."),
    "weight_decay": (_ZERO_OR_MORE, "Give 0 for none."),
    "adam_beta1": (_BELOW_ONE, "Give 0.9."),
    "adam_beta2": (_BELOW_ONE, "Give 0.95."),
    "adam_eps": (_POSITIVE, "Give 1e-8."),
    "clip_grad": (_ZERO_OR_MORE, "Give 1.0, or 0 to turn clipping off."),
    "save_interval": (_ONE_OR_MORE, "Leave it out to save only at the end."),
    "save_retain": (_ONE_OR_MORE, "Leave it out to keep every checkpoint."),
    "save_retain_interval": (_ONE_OR_MORE, "Leave it out to keep no checkpoint for its step."),
    "save_hf_shard_gb": (_POSITIVE, "Give 5."),
    "eval_interval": (_ONE_OR_MORE, "Leave it out to evaluate never."),
    "n_samples_per_eval_prompt": (_ONE_OR_MORE, "Give the number of answers per evaluation prompt."),
    "eval_max_response_len": (_ONE_OR_MORE, "Leave it out to use --rollout-max-response-len."),
    "eval_temperature": (_ZERO_OR_MORE, "Give 0 for greedy answers."),
    "eval_top_p": (_NUCLEUS, "Give 1.0 to turn nucleus sampling off."),
    "tensor_model_parallel_size": (_ONE_OR_MORE, "Give 1 for no tensor parallelism."),
    "pipeline_model_parallel_size": (_ONE_OR_MORE, "Give 1 for no pipeline parallelism."),
    "context_parallel_size": (_ONE_OR_MORE, "Give 1 for no context parallelism."),
    "num_layers_per_virtual_pipeline_stage": (_ONE_OR_MORE, "Leave it out for one part of the model per stage."),
    "expert_model_parallel_size": (_ONE_OR_MORE, "Give 1 for no expert parallelism."),
    "expert_tensor_parallel_size": (_ONE_OR_MORE, "Give 1, or leave it out."),
    "micro_batch_size": (_ONE_OR_MORE, "Give the samples of one micro-batch, or leave it out for a token budget."),
    "moe_aux_loss_coeff": (_ZERO_OR_MORE, "A negative weight would crowd the tokens onto one expert: give 0.001."),
    "opd_teacher_tensor_model_parallel_size": (_ONE_OR_MORE, "Leave it out for the student's."),
    "opd_teacher_pipeline_model_parallel_size": (_ONE_OR_MORE, "Leave it out for the student's."),
    "opd_teacher_context_parallel_size": (_ONE_OR_MORE, "Leave it out for the student's."),
    "opd_teacher_expert_model_parallel_size": (_ONE_OR_MORE, "Leave it out for the student's."),
    "actor_num_nodes": (_ONE_OR_MORE, "Give the number of machines that train."),
    "actor_num_gpus_per_node": (_ONE_OR_MORE, "Give the training ranks per machine; without a GPU they are processes."),
    "ray_cpus_per_process": (_ZERO_OR_MORE, "Give 1, or 0 to let processes share CPUs without Ray counting them."),
    "ray_timeout": (_POSITIVE, "It is in seconds: give 300."),
    "critic_num_nodes": (_ONE_OR_MORE, "Give the number of the critic's own machines, or leave it out."),
    "critic_num_gpus_per_node": (_ONE_OR_MORE, "Give the critic's own ranks per machine, or leave it out."),
    "opd_teacher_num_gpus": (_ONE_OR_MORE, "Give the devices of the teacher's servers, such as 4."),
    "opd_teacher_num_gpus_per_engine": (_ONE_OR_MORE, "Give the tensor-parallel size of one server, such as 4."),
    "max_tokens_per_gpu": (_ONE_OR_MORE, "Give the tokens of one micro-batch, such as 4096."),
    "make_vocab_size_divisible_by": (_ONE_OR_MORE, "Give 1 for no padding."),
    "num_saved_samples": (_ZERO_OR_MORE, "Give 0 to keep none."),
    "num_saved_alternatives": (Interval(0, 20), "Give 5, or 0 for none."),
    "prometheus_port": (Interval(1, 65535), "Give a free port such as 9400, or leave it out."),
    "distributed_timeout_minutes": (_ONE_OR_MORE, "Give 10."),
    "recompute_num_layers": (_ONE_OR_MORE, "Give 1."),
    "plan_prompt_len": (_ONE_OR_MORE, "Give the tokens of a usual prompt, or leave it out."),
    "plan_response_len": (_ONE_OR_MORE, "Give the tokens of a usual answer, or leave it out."),
    "plan_compute_share": (_NUCLEUS, "It is a share of the peak: give 0.4, or leave it out."),
    "plan_bandwidth_share": (_NUCLEUS, "It is a share of the bandwidth: give 0.6, or leave it out."),
    "plan_network_gbps": (_POSITIVE, "It is in gigabits per second: give 200."),
}


def number_rules(config: Config) -> Iterator[str]:
    values = config.flat()
    for name, (interval, remedy) in INTERVALS.items():
        value = values[name]
        if value is not None and value not in interval:
            yield f"{flag_text(name, value)} must be {interval}. {remedy}"
    for name in ("rollout_top_k", "eval_top_k"):
        if values[name] != -1 and values[name] < 1:
            yield (
                f"{flag_text(name, values[name])} must be -1 (off) or at least 1. Leave it out to sample from the "
                "whole vocabulary."
            )
    for name in ("attention_dropout", "hidden_dropout"):
        if values[name] != 0:
            yield (
                f"{flag_text(name, values[name])} must be 0: with dropout the trainer's recomputed log-probs differ "
                "from "
                "the rollout's at random. Leave it out."
            )
    if values["rotary_percent"] != 1.0:
        yield (
            f"{flag_text('rotary_percent', values['rotary_percent'])} must be 1.0: the supported models rotate whole "
            "heads. Leave it out."
        )
