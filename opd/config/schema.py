"""Every flag, declared once: name, type, default and help. ``flags.py`` makes argparse from it, ``validate.py`` checks it.

A field ``rollout_batch_size: int`` is the flag ``--rollout-batch-size``. Flags that slime or Megatron know keep their
names and meaning. Optional means "not given". Values are never rewritten; derived values are properties.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def flag(default: Any, help: str, *, choices: tuple[str, ...] | None = None, nargs: str | None = None) -> Any:
    metadata = {"help": help, "choices": choices, "nargs": nargs}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    hf_checkpoint: str | None = flag(None, "Hugging Face folder of the student: tokenizer, config, and its weights unless --load or --ref-load holds some")
    ref_load: str | None = flag(None, "torch_dist folder with the student's initial weights, used when --load holds no checkpoint")
    load: str | None = flag(None, "torch_dist folder to resume from: weights, optimizer, scheduler, RNG, data cursor, step")
    save: str | None = flag(None, "folder for checkpoints (iter_NNNNNNN/ and latest_checkpointed_iteration.txt)")
    save_interval: int | None = flag(None, "save every this many rollouts, and at the end; without it only at the end")
    no_load_optim: bool = flag(False, "resume without the optimizer state")
    no_load_rng: bool = flag(False, "resume without the RNG state")
    finetune: bool = flag(False, "load weights only and start at step 0")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Megatron's names. Each may be left out when --hf-checkpoint gives it, and must agree when both do."""

    num_layers: int | None = flag(None, "transformer layers")
    hidden_size: int | None = flag(None, "width of the residual stream")
    ffn_hidden_size: int | None = flag(None, "width of the MLP")
    num_attention_heads: int | None = flag(None, "query heads")
    group_query_attention: bool = flag(False, "grouped-query attention; needs --num-query-groups")
    num_query_groups: int | None = flag(None, "key/value heads")
    kv_channels: int | None = flag(None, "dimensions per head")
    max_position_embeddings: int | None = flag(None, "longest sequence, in tokens")
    vocab_size: int | None = flag(None, "rows of the embedding")
    normalization: str | None = flag(None, "normalization layer", choices=("RMSNorm",))
    norm_epsilon: float | None = flag(None, "epsilon of the normalization")
    rotary_base: float | None = flag(None, "RoPE base")
    rotary_percent: float = flag(1.0, "share of each head that RoPE rotates")
    position_embedding_type: str = flag("rope", "position embedding", choices=("rope",))
    use_rotary_position_embeddings: bool = flag(False, "accepted for Megatron scripts: RoPE is the only choice")
    use_rope_scaling: bool = flag(False, "Llama 3.1 style RoPE scaling; read from --hf-checkpoint")
    swiglu: bool = flag(False, "gated SiLU MLP; read from --hf-checkpoint")
    disable_bias_linear: bool = flag(False, "no bias in linear layers; read from --hf-checkpoint")
    add_qkv_bias: bool = flag(False, "bias in the QKV projection (Qwen2)")
    qk_layernorm: bool = flag(False, "normalize queries and keys (Qwen3)")
    untie_embeddings_and_output_weights: bool = flag(False, "separate output head")
    make_vocab_size_divisible_by: int = flag(1, "pad the vocabulary to a multiple of this times the TP size")
    attention_dropout: float = flag(0.0, "must be 0: log-probs are recomputed")
    hidden_dropout: float = flag(0.0, "must be 0: log-probs are recomputed")
    bf16: bool = flag(False, "train in bfloat16 (fp32 without it)")
    attention_backend: str = flag("auto", "accepted for slime scripts: the kernel is Transformer Engine's choice where that is installed, else torch's SDPA", choices=("auto", "flash", "fused", "unfused", "local"))


@dataclass(frozen=True, kw_only=True)
class ParallelFlags:
    tensor_model_parallel_size: int = flag(1, "tensor-parallel ranks")
    pipeline_model_parallel_size: int = flag(1, "pipeline stages")
    context_parallel_size: int = flag(1, "context-parallel ranks")
    sequence_parallel: bool = flag(False, "shard norms and residuals over the tensor-parallel group")
    actor_num_nodes: int = flag(1, "machines that train")
    actor_num_gpus_per_node: int = flag(1, "training ranks per machine")
    max_tokens_per_gpu: int = flag(4096, "tokens per micro-batch and rank; a longer sequence makes a micro-batch of its own")
    logits_chunk_tokens: int = flag(256, "response tokens whose logits exist at the same time; the rest are recomputed in the backward pass")
    use_dynamic_batch_size: bool = flag(False, "accepted for slime scripts: micro-batches always follow --max-tokens-per-gpu")
    use_distributed_optimizer: bool = flag(False, "shard optimizer state over the data-parallel ranks")
    recompute_granularity: str | None = flag(None, "recompute activations in the backward pass", choices=("full", "selective"))
    recompute_method: str | None = flag(None, "with --recompute-granularity full", choices=("uniform", "block"))
    recompute_num_layers: int | None = flag(None, "layers per recomputed block")
    attention_softmax_in_fp32: bool = flag(False, "accepted for Megatron scripts: attention softmax is at least fp32-accurate")
    accumulate_allreduce_grads_in_fp32: bool = flag(False, "accepted for Megatron scripts: gradients are always accumulated and reduced in fp32")

    @property
    def world_size(self) -> int:
        return self.actor_num_nodes * self.actor_num_gpus_per_node

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """Low-rank adapters (arXiv 2106.09685): the base weights stay frozen, checkpoints hold the adapters."""

    lora_rank: int | None = flag(None, "train low-rank adapters of this rank instead of the weights")
    lora_alpha: float | None = flag(None, "adapters are scaled by alpha / rank; twice the rank without it")
    lora_target_modules: list[str] | None = flag(None, "linear layers with an adapter: linear_qkv linear_proj linear_fc1 linear_fc2; all of them without it", nargs="+")


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    optimizer: str = flag("adam", "AdamW, by Megatron's name", choices=("adam",))
    lr: float = flag(1e-6, "peak learning rate")
    min_lr: float = flag(0.0, "learning rate at the end of the decay")
    lr_decay_style: str = flag("constant", "shape after warm-up", choices=("constant", "linear", "cosine"))
    lr_warmup_iters: int = flag(0, "optimizer steps of linear warm-up")
    lr_decay_iters: int | None = flag(None, "optimizer steps until --min-lr; the whole run without it")
    weight_decay: float = flag(0.0, "decoupled weight decay")
    adam_beta1: float = flag(0.9, "Adam beta 1")
    adam_beta2: float = flag(0.95, "Adam beta 2")
    adam_eps: float = flag(1e-8, "Adam epsilon")
    clip_grad: float = flag(1.0, "largest global gradient norm; 0 turns clipping off")
    seed: int = flag(1234, "seed of weight initialisation and of the trainer")


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    prompt_data: str | None = flag(None, "JSONL or parquet file of training prompts")
    input_key: str = flag("input", "field with the prompt: a string, or a list of chat messages")
    label_key: str | None = flag(None, "field with the reference answer")
    metadata_key: str = flag("metadata", "field with a dict handed to reward functions")
    apply_chat_template: bool = flag(False, "render the prompt with the tokenizer's chat template")
    rollout_shuffle: bool = flag(False, "shuffle the prompts anew in each epoch")
    rollout_max_prompt_len: int | None = flag(None, "skip (and count) prompts longer than this many tokens")


@dataclass(frozen=True, kw_only=True)
class RolloutFlags:
    rollout_engine: str = flag("torch", "who generates: torch (in this process), sglang (server processes), speculative_kd (in this process; the co-loaded teacher replaces tokens outside its top k) or mixture (in this process; student and teacher together)", choices=("torch", "sglang", "speculative_kd", "mixture"))
    skd_top_k: int = flag(25, "speculative_kd: a proposed token stays when it is among the teacher's k likeliest")
    num_rollout: int | None = flag(None, "rollouts in the whole run, including those before a resume")
    rollout_batch_size: int | None = flag(None, "prompts per rollout")
    n_samples_per_prompt: int = flag(1, "answers per prompt: the group of GRPO")
    rollout_max_response_len: int = flag(1024, "tokens per answer at most")
    rollout_max_context_len: int | None = flag(None, "tokens of prompt and answer at most; the model's limit without it")
    rollout_temperature: float = flag(1.0, "sampling temperature")
    rollout_top_p: float = flag(1.0, "nucleus sampling")
    rollout_top_k: int = flag(-1, "sample from the k likeliest tokens; -1: off")
    rollout_seed: int = flag(42, "seed of prompt order and sampling")
    rollout_stop_token_ids: list[int] | None = flag(None, "token ids that end an answer besides the model's own", nargs="+")
    rollout_max_running_requests: int = flag(256, "answers decoded at the same time")
    rollout_num_gpus: int = flag(1, "devices for SGLang engines")
    rollout_num_gpus_per_engine: int = flag(1, "tensor-parallel size of one SGLang engine")
    sglang_server_timeout: float = flag(180.0, "seconds to wait for an SGLang engine to come up")
    sglang_mem_fraction_static: float | None = flag(None, "SGLang's --mem-fraction-static (GPU)")
    sglang_port: int | None = flag(None, "port of the rollout engine; a free one without it")
    sglang_max_restarts: int = flag(3, "how often a run starts each SGLang engine again after its death, with the current weights, of which a copy is kept for that: in this process's memory, or on disk where they go through disk; 0: never, and no copy")
    sglang_weight_sync: str = flag("auto", "how weights reach the SGLang engines: memory (shared memory), disk (a folder in --output-dir), distributed (broadcast over gloo, NCCL on CUDA) or auto (memory where it can hold them, else disk)", choices=("auto", "memory", "disk", "distributed"))
    use_sglang_router: bool = flag(False, "put sglang-router in front of the SGLang engines; without it each prompt goes to the engine with the fewest requests")
    async_rollout: bool = flag(False, "write the next rollout in the background while this one is trained on: answers come from weights that are a little older")
    async_max_staleness: int = flag(1, "with --async-rollout: rollouts written ahead, hence how many updates old the weights of an answer are at most; 0: the synchronous order")
    async_correction: str = flag("tis", "with --async-rollout, what the policy loss does about answers of older weights: tis (weigh each token by the clamped ratio of the trainer's to the writer's probability, as --use-tis) or none", choices=("tis", "none"))
    async_ratio_gate: list[float] | None = flag(None, "LOW HIGH: with --async-rollout, leave a token out of the policy loss and its penalty where the trainer's over the writer's probability is outside", nargs="+")
    max_logprob_mismatch: float | None = flag(None, "stop when, after a weight sync, the engine's log-probs of a probe text are off by more than this on average, in nats; 1e-3 without it, 0.1 with --bf16")


@dataclass(frozen=True, kw_only=True)
class AlgorithmFlags:
    advantage_estimator: str = flag("grpo", "how rewards become advantages, and which ratio the loss clips", choices=("grpo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"))
    disable_grpo_std_normalization: bool = flag(False, "subtract the group's mean without dividing by its deviation (grpo, gspo, cispo)")
    normalize_advantages: bool = flag(False, "whiten the estimator's advantages over the batch, before the OPD penalty")
    gamma: float = flag(1.0, "discount per token (ppo, reinforce_plus_plus)")
    lambd: float = flag(1.0, "lambda of generalised advantage estimation (ppo)")
    global_batch_size: int | None = flag(None, "samples per optimizer step; all samples of a rollout without it")
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
    value_clip: float = flag(0.2, "a value moves at most this far from the one before the update before its gradient is cut")


@dataclass(frozen=True, kw_only=True)
class RewardFlags:
    rm_type: str | None = flag(None, "rule for the task reward", choices=("exact", "math", "final_answer"))
    custom_rm_path: str | None = flag(None, "module.function, async (args, sample) -> float")
    custom_reward_post_process_path: str | None = flag(None, "module.function, (args, samples) -> (raw rewards, rewards)")
    rm_url: str | None = flag(None, "the teacher server's /generate address for --opd-type sglang; several servers of the same teacher with commas between them, each with *WEIGHT behind it (its share of the load) or without")


@dataclass(frozen=True, kw_only=True)
class EvalFlags:
    eval_interval: int | None = flag(None, "evaluate before the first and after every this many rollouts, and at the end")
    eval_prompt_data: list[str] | None = flag(None, "NAME PATH pairs of evaluation sets, or one PATH", nargs="+")
    n_samples_per_eval_prompt: int = flag(1, "answers per evaluation prompt")
    eval_max_response_len: int | None = flag(None, "tokens per answer; as in training without it")
    eval_temperature: float = flag(0.0, "0: greedy")
    eval_top_p: float = flag(1.0, "nucleus sampling")
    eval_top_k: int = flag(-1, "-1: off")
    eval_input_key: str | None = flag(None, "as --input-key without it")
    eval_label_key: str | None = flag(None, "as --label-key without it")
    skip_eval_before_train: bool = flag(False, "no evaluation before the first rollout")


@dataclass(frozen=True, kw_only=True)
class OpdFlags:
    use_opd: bool = flag(False, "on-policy distillation: subtract coef * reverse KL from the advantage of every token")
    opd_type: str | None = flag(None, "where the teacher runs: sglang (server, --rm-url) or megatron (co-loaded, --opd-teacher-load)", choices=("sglang", "megatron"))
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
    opd_teacher_hf_checkpoint: str | None = flag(None, "Hugging Face folder with the teacher's config and tokenizer, for a torch_dist teacher whose folder holds none")
    opd_teacher_timeout: float = flag(60.0, "seconds for one scoring request, before a retry")
    opd_teacher_retries: int = flag(3, "retries of one scoring request that times out or gets no proper answer, before the sample is masked; a server that is down or busy is asked until --opd-teacher-deadline")
    opd_teacher_deadline: float = flag(300.0, "seconds for one sample, all attempts and the waiting for a server that is down included, before it is masked")
    opd_teacher_hedge: float = flag(3.0, "several addresses: another one is asked too when a request takes this many times the median; 0: never")
    opd_teacher_wait: float = flag(600.0, "seconds to wait for the teacher, and to ask again, when it leaves more than --opd-max-unscored-share of a rollout without a score; then the run stops (after saving). With several ranks at most what --distributed-timeout-minutes leaves")
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
    opd_skip_teacher_selftest: bool = flag(False, "do not compare tokenizer and temperature with the teacher at start")


@dataclass(frozen=True, kw_only=True)
class DistillationFlags:
    """Losses on the whole next-token distribution, in place of the penalty on the sampled token."""

    distillation_type: str | None = flag(None, "minimise the divergence of the distributions at every response token: reverse_kl KL(student || teacher), forward_kl KL(teacher || student), gkd (generalised Jensen-Shannon)", choices=("reverse_kl", "forward_kl", "gkd"))
    distillation_beta: float = flag(0.5, "gkd: weight of the teacher in the mixture; 0 is forward_kl, 1 is reverse_kl")
    distillation_temperature: float = flag(1.0, "divides both models' logits")
    distillation_top_k: int | None = flag(None, "compare k tokens and one bucket with the rest, instead of the whole vocabulary")
    distillation_support: str = flag("teacher", "whose k likeliest tokens --distillation-top-k keeps", choices=("teacher", "student", "union"))
    lambda_rl: float | None = flag(None, "weight of the policy loss beside a distillation loss; 0 (distillation only) without it")
    lambda_distill: float = flag(1.0, "weight of the distillation loss")


@dataclass(frozen=True, kw_only=True)
class OffPolicyFlags:
    """Answers from a file (a teacher's, usually) instead of the student's own: warm-up, and a share of each batch."""

    sft_data: str | None = flag(None, "JSONL or parquet file of prompts with answers")
    sft_response_key: str = flag("response", "field of --sft-data with the answer; prompts are read as --prompt-data's")
    sft_steps: int = flag(0, "the first this many of --num-rollout steps learn from --sft-data alone")
    opd_off_policy_fraction: float = flag(0.0, "share of each later batch that comes from --sft-data")
    lambda_sft: float = flag(1.0, "weight of the log-likelihood of --sft-data beside the other losses")


@dataclass(frozen=True, kw_only=True)
class MixtureFlags:
    """--rollout-engine mixture: answers come from q, proportional to student^(1 - a) * teacher^a at every token."""

    mixture_alpha_method: str = flag("kl_symmetry", "how the teacher's weight a is found at every token: kl_symmetry (q is as far from either model, in KL), ess_balance (a = 0.5), ess_weights (its importance weights towards either have the same variance), entropy (by the models' uncertainties) or fixed", choices=("kl_symmetry", "ess_balance", "ess_weights", "entropy", "fixed"))
    mixture_fixed_alpha: float | None = flag(None, "a itself, with --mixture-alpha-method fixed: 0 is the student alone, 1 the teacher alone")
    mixture_alpha_scale: list[float] | None = flag(None, "START END: the weight in use is min(1, scale * a), and scale goes from START (first rollout) to END in equal steps; 2 is nearly the teacher alone, 0 the student alone; 1 throughout without it", nargs="+")
    mixture_schedule_steps: int | None = flag(None, "rollouts until --mixture-alpha-scale is at END; all of --num-rollout without it")
    mixture_teacher_load: str | None = flag(None, "Hugging Face folder of the teacher that helps to write; --opd-teacher-load without it, or the student itself with --opd-teacher-self live")
    mixture_teacher_prompt_key: str | None = flag(None, "field with the prompt that this teacher reads")
    mixture_teacher_prompt_template: str | None = flag(None, "the prompt that this teacher reads, made from {prompt}, {label} and the row's other fields; without any of these three flags that of --opd-teacher-prompt-*, else the student's")
    mixture_teacher_system_prompt: str | None = flag(None, "system message that this teacher reads, with --apply-chat-template")
    mixture_decoding: str = flag("speculative", "speculative (the student drafts, the teacher judges several tokens at once) or lockstep (both models at every token); the same distribution", choices=("speculative", "lockstep"))
    mixture_draft_tokens: int | None = flag(None, "tokens per draft of speculative decoding; chosen by measured acceptance and cost without it")


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    output_dir: str | None = flag(None, "folder for metrics.jsonl, curves.png, tensorboard/ and samples/")
    dry_run: bool = flag(False, "parse, validate, print the plan and exit; starts nothing and loads no weights")
    use_tensorboard: bool = flag(True, "write TensorBoard event files under OUTPUT_DIR/tensorboard")
    use_wandb: bool = flag(False, "log to Weights & Biases (needs the wandb package)")
    wandb_project: str | None = flag(None, "W&B project")
    wandb_group: str | None = flag(None, "W&B group")
    wandb_mode: str = flag("online", "W&B mode", choices=("online", "offline", "disabled"))
    prometheus_port: int | None = flag(None, "serve the metrics to Prometheus at http://127.0.0.1:PORT/metrics while the run lasts")
    prometheus_host: str | None = flag(None, "address on which --prometheus-port listens; 127.0.0.1 without it, 0.0.0.0 for every network")
    num_saved_samples: int = flag(8, "samples per rollout written to OUTPUT_DIR/samples/ with their per-token values")
    trust_remote_code: bool = flag(False, "run code that comes with a Hugging Face folder")
    distributed_timeout_minutes: int = flag(10, "time-out of collectives")


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint: CheckpointFlags = CheckpointFlags()
    model: ModelFlags = ModelFlags()
    parallel: ParallelFlags = ParallelFlags()
    lora: LoraFlags = LoraFlags()
    optimizer: OptimizerFlags = OptimizerFlags()
    data: DataFlags = DataFlags()
    rollout: RolloutFlags = RolloutFlags()
    algorithm: AlgorithmFlags = AlgorithmFlags()
    critic: CriticFlags = CriticFlags()
    reward: RewardFlags = RewardFlags()
    eval: EvalFlags = EvalFlags()
    opd: OpdFlags = OpdFlags()
    distillation: DistillationFlags = DistillationFlags()
    off_policy: OffPolicyFlags = OffPolicyFlags()
    mixture: MixtureFlags = MixtureFlags()
    output: OutputFlags = OutputFlags()

    @property
    def samples_per_rollout(self) -> int:
        return (self.rollout.rollout_batch_size or 0) * self.rollout.n_samples_per_prompt

    @property
    def global_batch_size(self) -> int:
        return self.algorithm.global_batch_size or self.samples_per_rollout

    @property
    def optimizer_steps_per_rollout(self) -> int:
        return self.samples_per_rollout // self.global_batch_size

    @property
    def rollouts_ahead(self) -> int:
        """Rollouts that are written before their turn; 0: the synchronous order."""
        return self.rollout.async_max_staleness if self.rollout.async_rollout else 0

    @property
    def weighs_importance(self) -> bool:
        """Whether the policy loss weighs each token by the ratio of the trainer's to the writer's probability.

        Answers of older weights need it: the ratio that the loss clips starts at 1 with the weights before the update,
        whoever wrote the answer. With one rollout of lag it is near 1, so it removes the bias at little variance.
        """
        return self.algorithm.use_tis or (self.rollouts_ahead > 0 and self.rollout.async_correction == "tis")

    @property
    def max_logprob_mismatch(self) -> float:
        """Nats per token. In fp32 a missed update of a small model shows; in bf16 rounding alone is about 0.01."""
        given = self.rollout.max_logprob_mismatch
        return given if given is not None else 0.1 if self.model.bf16 else 1e-3

    @property
    def kl_temperature(self) -> float:
        """Temperature of both distributions in the OPD penalty: a server's input log-probs are always at 1, and a
        behaviour log-prob is at the rollout temperature."""
        return self.rollout.rollout_temperature if self.opd.opd_type == "megatron" else 1.0

    @property
    def penalty_coef(self) -> float:
        """Weight of the reverse KL in the advantage: a distillation loss takes the penalty's place."""
        penalised = self.opd.use_opd and self.distillation.distillation_type is None
        return self.opd.opd_kl_coef if penalised else 0.0

    @property
    def policy_weight(self) -> float:
        """Weight of the policy loss: beside a distillation loss, 0 unless --lambda-rl is given."""
        given = self.distillation.lambda_rl
        return given if given is not None else 1.0 if self.distillation.distillation_type is None else 0.0

    @property
    def needs_reference(self) -> bool:
        """Whether the KL to the reference model (--ref-load, else --hf-checkpoint) is computed."""
        return self.algorithm.use_kl_loss or self.algorithm.kl_coef != 0

    @property
    def teacher_wait_seconds(self) -> float:
        """--opd-teacher-wait, but no longer than the other ranks wait at their next collective."""
        opd, patience = self.opd, 0.8 * 60 * self.output.distributed_timeout_minutes
        if self.parallel.world_size == 1:
            return opd.opd_teacher_wait
        return max(0.0, min(opd.opd_teacher_wait, patience - opd.opd_teacher_deadline))

    @property
    def written_with_teacher(self) -> bool:
        """Whether a teacher has a hand in every token of the rollout, whose log-probs are then not the student's."""
        return self.rollout.rollout_engine in ("speculative_kd", "mixture")

    @property
    def uses_critic(self) -> bool:
        return self.algorithm.advantage_estimator == "ppo"

    @property
    def eval_sets(self) -> list[tuple[str, str]]:
        """(name, path) of each evaluation set."""
        given = self.eval.eval_prompt_data or []
        if len(given) == 1:
            return [("eval", given[0])]
        return list(zip(given[::2], given[1::2], strict=True))

    def flat(self) -> dict[str, Any]:
        """All flags by name: what custom functions receive as ``args``."""
        return {f.name: getattr(section, f.name) for section in self.sections() for f in fields(section)}

    def sections(self) -> list[Any]:
        return [getattr(self, f.name) for f in fields(self)]
