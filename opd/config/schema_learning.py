"""Flags of what the student is told: estimator, critic, teacher, distillation."""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.schema_flag import flag


@dataclass(frozen=True, kw_only=True)
class AlgorithmFlags:
    advantage_estimator: str = flag("grpo", "how rewards become advantages, and which ratio the loss clips", choices=("grpo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"))
    disable_grpo_std_normalization: bool = flag(False, "subtract the group's mean without dividing by its deviation (grpo, gspo, cispo)")
    normalize_advantages: bool = flag(False, "whiten the estimator's advantages over the batch, before the OPD penalty")
    gamma: float = flag(1.0, "discount per token (ppo, reinforce_plus_plus)")
    lambd: float = flag(1.0, "lambda of generalised advantage estimation (ppo)")
    global_batch_size: int | None = flag(None, "samples per optimizer step; all samples of a rollout without it")
    num_steps_per_rollout: int | None = flag(None, "optimizer steps per rollout, in place of --global-batch-size")
    eps_clip: float = flag(0.2, "PPO clip below: ratio >= 1 - eps")
    eps_clip_high: float | None = flag(None, "PPO clip above: ratio <= 1 + eps; --eps-clip without it")
    eps_clip_c: float | None = flag(None, "dual clip: a negative advantage weighs at most this times itself, whatever the ratio")
    calculate_per_token_loss: bool = flag(False, "average the loss over tokens; without it over samples of their token mean")
    kl_coef: float = flag(0.0, "weight of the KL to the reference model in the reward of every token (ppo, reinforce_plus_plus, reinforce_plus_plus_baseline)")
    use_kl_loss: bool = flag(False, "compute the KL to the reference model as a loss, weighted with --kl-loss-coef")
    kl_loss_coef: float = flag(0.0, "weight of the KL loss; 0 only reports it")
    kl_loss_type: str = flag("k2", "estimator of the KL that is back-propagated: k2 has the gradient of KL(student || reference), k3 = low_var_kl that of KL(reference || student), k1 none (only to report)", choices=("k1", "k2", "k3", "low_var_kl"))
    entropy_coef: float = flag(0.0, "weight of the entropy bonus")
    use_tis: bool = flag(False, "truncated importance sampling: weigh each token by the ratio of the trainer's to the rollout engine's probability, clamped")
    tis_clip: float = flag(2.0, "largest weight with --use-tis")
    tis_clip_low: float = flag(0.0, "smallest weight with --use-tis")
    custom_advantage_function_path: str | None = flag(None, "module.function, (args, batch) -> advantages [T]: has the last word on the advantage of every response token")


@dataclass(frozen=True, kw_only=True)
class CriticFlags:
    """The value model of --advantage-estimator ppo: the student's body with a scalar head, in the same layout."""

    critic_load: str | None = flag(None, "torch_dist folder of the critic to resume from, or Hugging Face folder of its initial body; the student's initial weights without it")
    critic_save: str | None = flag(None, "folder for the critic's checkpoints; SAVE/critic without it")
    critic_lr: float | None = flag(None, "peak learning rate of the critic; --lr without it")
    critic_lr_warmup_iters: int = flag(0, "optimizer steps of linear warm-up of the critic")
    num_critic_only_steps: int = flag(0, "rollouts at the start that train the critic alone")
    critic_num_nodes: int | None = flag(None, "over Ray, machines of the critic's own ranks; beside --critic-num-gpus-per-node 1 without it. Without both flags the critic shares the training ranks")
    critic_num_gpus_per_node: int | None = flag(None, "over Ray, ranks of the critic's own per machine; beside --critic-num-nodes 1 without it")
    value_clip: float = flag(0.2, "a value moves at most this far from the one before the update before its gradient is cut")


@dataclass(frozen=True, kw_only=True)
class OpdFlags:
    use_opd: bool = flag(False, "on-policy distillation: subtract coef * reverse KL from the advantage of every token")
    opd_type: str | None = flag(None, "where the teacher runs: sglang (server, --rm-url), megatron (co-loaded, --opd-teacher-load) or custom (a function of yours, --opd-custom-teacher-path)", choices=("sglang", "megatron", "custom"))
    opd_kl_coef: float = flag(1.0, "weight of the reverse KL in the advantage")
    opd_kl_clip: float | None = flag(None, "largest absolute reverse KL of a token in the penalty, in nats, before --opd-kl-discount and --opd-kl-coef")
    opd_kl_discount: float = flag(0.0, "a token also pays for the reverse KL of those after it, discounted by this per token; 0: its own only")
    opd_student_logprobs: str = flag("recomputed", "student's side of the reverse KL: recomputed (the trainer's) or behaviour (the rollout engine's)", choices=("recomputed", "behaviour"))
    opd_whiten_penalty: bool = flag(False, "with --normalize-advantages, subtract the penalty before whitening instead of after")
    opd_teachers: list[str] | None = flag(None, "several teachers: NAME=FOLDER (megatron) or NAME=URL (sglang; NAME=URL,URL as --rm-url) each, instead of --opd-teacher-load or --rm-url", nargs="+")
    opd_teacher_key: str = flag("teacher", "metadata field that names a prompt's teacher, with --opd-teacher-combine route")
    opd_teacher_combine: str = flag("route", "several teachers: route (one per sample, by metadata), logits (weighted mean of logits) or probs (weighted mixture of probabilities)", choices=("route", "logits", "probs"))
    opd_teacher_weights: list[str] | None = flag(None, "NAME=WEIGHT for logits and probs; equal without it, normalised to 1", nargs="+")
    opd_teacher_kl_coefs: list[str] | None = flag(None, "NAME=COEF: --opd-kl-coef (or --lambda-distill) of samples routed to this teacher, relative to it", nargs="+")
    opd_teacher_self: str | None = flag(None, "megatron: the teacher is the student itself: live (as it is), frozen (as at the start) or ema (moving average)", choices=("live", "frozen", "ema"))
    opd_teacher_ema_decay: float = flag(0.99, "per optimizer step, with --opd-teacher-self ema")
    opd_teacher_prompt_key: str | None = flag(None, "field with the teacher's own prompt: it sees more than the student")
    opd_teacher_prompt_template: str | None = flag(None, "the teacher's prompt, made from {prompt}, {label} and the row's other fields")
    opd_teacher_system_prompt: str | None = flag(None, "system message of the teacher's prompt, with --apply-chat-template")
    opd_teacher_load: str | None = flag(None, "co-loaded teacher: torch_dist or Hugging Face folder")
    opd_teacher_ckpt_step: int | None = flag(None, "step of a torch_dist teacher; the latest without it")
    opd_teacher_tensor_model_parallel_size: int | None = flag(None, "tensor-parallel ranks of a co-loaded teacher, in place of the student's")
    opd_teacher_pipeline_model_parallel_size: int | None = flag(None, "its pipeline stages, in place of the student's")
    opd_teacher_context_parallel_size: int | None = flag(None, "its context-parallel ranks, in place of the student's")
    opd_teacher_expert_model_parallel_size: int | None = flag(None, "ranks over which its experts are divided, in place of the student's")
    opd_teacher_hf_checkpoint: str | None = flag(None, "Hugging Face folder with the teacher's config and tokenizer, for a torch_dist teacher whose folder holds none")
    opd_custom_teacher_path: str | None = flag(None, "custom: module.function, (args, sample) -> log-probs of the response tokens (nats, temperature 1); plain (one sample at a time, in a thread) or async (all that wait)")
    opd_teacher_serve: str | None = flag(None, "sglang: Hugging Face folder of a teacher whose SGLang servers the run starts, watches and stops itself, instead of --rm-url")
    opd_teacher_num_gpus: int = flag(1, "devices for the servers of --opd-teacher-serve")
    opd_teacher_num_gpus_per_engine: int = flag(1, "tensor-parallel size of one of these servers")
    opd_teacher_timeout: float = flag(300.0, "seconds for one scoring request, before a retry")
    opd_teacher_retries: int = flag(3, "retries of one scoring request that times out or gets no proper answer, before the sample is masked; a server that is down or busy is asked until --opd-teacher-deadline")
    opd_teacher_deadline: float = flag(1800.0, "seconds for one sample (with --distillation-support student or union for each piece of it), all attempts and the waiting for a server that is down included, before it is masked")
    opd_teacher_hedge: float = flag(3.0, "several addresses: another one is asked too when a request takes this many times the median; 0: never")
    opd_teacher_wait: float = flag(1800.0, "seconds to wait for the teacher, and to ask again, when it leaves more than --opd-max-unscored-share of a rollout without a score; then the run stops (after saving)")
    opd_teacher_concurrency: int = flag(64, "samples that are being scored at each address")
    opd_teacher_batch: int = flag(64, "samples in one scoring request: those that wait for an address at the same time go together; 1, behind a router: each by itself")
    opd_teacher_ca_file: str | None = flag(None, "PEM file with the certificates to trust at https addresses, in place of the system's")
    opd_teacher_api_key_env: str | None = flag(None, "name of the environment variable with the teacher server's API key")
    opd_teacher_cache: str | None = flag(None, "folder in which served teachers' scores are kept and looked up, by token ids and teacher: a repeated or resumed run does not ask for them again")
    opd_teacher_cache_gb: float = flag(10.0, "GB of --opd-teacher-cache at most; beyond it the scores unused for longest are dropped")
    opd_teacher_cache_name: str | None = flag(None, "your name for the teachers' weights in --opd-teacher-cache: change it when a server on another machine loads slightly different weights under the same name")
    opd_teacher_tokenizer: str | None = flag(None, "sglang: Hugging Face folder with the teacher's tokenizer when it is not the student's; the teacher then reads the text, and log-probs are compared by spans in which both have whole tokens")
    opd_min_token_coverage: float = flag(0.9, "with --opd-teacher-tokenizer, stop (after saving) when a smaller share of a rollout's tokens is in such spans")
    opd_max_unscored_share: float = flag(0.5, "stop (after saving) when a larger share of a rollout has no teacher score")
    opd_skip_teacher_selftest: bool = flag(False, "do not compare tokenizer and temperature with the served teacher at start, and do not try --opd-custom-teacher-path on a short text")


@dataclass(frozen=True, kw_only=True)
class DistillationFlags:
    """Losses on the whole next-token distribution, in place of the penalty on the sampled token."""

    distillation_type: str | None = flag(None, "minimise the divergence of the distributions at every response token: reverse_kl KL(student || teacher), forward_kl KL(teacher || student), gkd (generalised Jensen-Shannon), custom (--custom-divergence-function-path)", choices=("reverse_kl", "forward_kl", "gkd", "custom"))
    custom_divergence_function_path: str | None = flag(None, "custom: module.function, (args, student log-probs [rows, vocabulary], teacher's) -> divergence [rows], or terms [rows, vocabulary] that add up to it; autograd gives the gradient")
    distillation_beta: float = flag(0.5, "gkd: weight of the teacher in the mixture; 0 is forward_kl, 1 is reverse_kl")
    distillation_temperature: float = flag(1.0, "divides both models' logits")
    distillation_top_k: int | None = flag(None, "compare k tokens and one bucket with the rest, instead of the whole vocabulary")
    distillation_support: str = flag("teacher", "whose k likeliest tokens --distillation-top-k keeps", choices=("teacher", "student", "union"))
    lambda_rl: float | None = flag(None, "weight of the policy loss beside a distillation loss; 0 (distillation only) without it")
    lambda_distill: float = flag(1.0, "weight of the distillation loss")
