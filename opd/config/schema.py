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
    rollout_engine: str = flag("torch", "who generates: torch (in this process) or sglang (server processes)", choices=("torch", "sglang"))
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
    max_logprob_mismatch: float | None = flag(None, "stop when, after a weight sync, the engine's log-probs of a probe text are off by more than this on average, in nats; 1e-3 without it, 0.1 with --bf16")


@dataclass(frozen=True, kw_only=True)
class AlgorithmFlags:
    advantage_estimator: str = flag("grpo", "how rewards become advantages", choices=("grpo",))
    disable_grpo_std_normalization: bool = flag(False, "subtract the group's mean without dividing by its deviation")
    normalize_advantages: bool = flag(False, "whiten the estimator's advantages over the batch, before the OPD penalty")
    global_batch_size: int | None = flag(None, "samples per optimizer step; all samples of a rollout without it")
    eps_clip: float = flag(0.2, "PPO clip below: ratio >= 1 - eps")
    eps_clip_high: float | None = flag(None, "PPO clip above: ratio <= 1 + eps; --eps-clip without it")
    calculate_per_token_loss: bool = flag(False, "average the loss over tokens; without it over samples of their token mean")


@dataclass(frozen=True, kw_only=True)
class RewardFlags:
    rm_type: str | None = flag(None, "rule for the task reward", choices=("exact", "math", "final_answer"))
    custom_rm_path: str | None = flag(None, "module.function, async (args, sample) -> float")
    custom_reward_post_process_path: str | None = flag(None, "module.function, (args, samples) -> (raw rewards, rewards)")
    rm_url: str | None = flag(None, "the teacher server's /generate address for --opd-type sglang")


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
    opd_teacher_load: str | None = flag(None, "co-loaded teacher: torch_dist or Hugging Face folder")
    opd_teacher_ckpt_step: int | None = flag(None, "step of a torch_dist teacher; the latest without it")
    opd_teacher_hf_checkpoint: str | None = flag(None, "Hugging Face folder with the teacher's config and tokenizer, for a torch_dist teacher whose folder holds none")
    opd_teacher_timeout: float = flag(60.0, "seconds for one scoring request, before a retry")
    opd_teacher_retries: int = flag(3, "retries of one scoring request before the sample is masked")
    opd_teacher_concurrency: int = flag(64, "scoring requests in flight")
    opd_teacher_api_key_env: str | None = flag(None, "name of the environment variable with the teacher server's API key")
    opd_max_unscored_share: float = flag(0.5, "stop (after saving) when a larger share of a rollout has no teacher score")
    opd_skip_teacher_selftest: bool = flag(False, "do not compare tokenizer and temperature with the teacher at start")


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    output_dir: str | None = flag(None, "folder for metrics.jsonl, curves.png, tensorboard/ and samples/")
    dry_run: bool = flag(False, "parse, validate, print the plan and exit; starts nothing and loads no weights")
    use_tensorboard: bool = flag(True, "write TensorBoard event files under OUTPUT_DIR/tensorboard")
    use_wandb: bool = flag(False, "log to Weights & Biases (needs the wandb package)")
    wandb_project: str | None = flag(None, "W&B project")
    wandb_group: str | None = flag(None, "W&B group")
    wandb_mode: str = flag("online", "W&B mode", choices=("online", "offline", "disabled"))
    num_saved_samples: int = flag(8, "samples per rollout written to OUTPUT_DIR/samples/ with their per-token values")
    trust_remote_code: bool = flag(False, "run code that comes with a Hugging Face folder")
    distributed_timeout_minutes: int = flag(10, "time-out of collectives")


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint: CheckpointFlags = CheckpointFlags()
    model: ModelFlags = ModelFlags()
    parallel: ParallelFlags = ParallelFlags()
    optimizer: OptimizerFlags = OptimizerFlags()
    data: DataFlags = DataFlags()
    rollout: RolloutFlags = RolloutFlags()
    algorithm: AlgorithmFlags = AlgorithmFlags()
    reward: RewardFlags = RewardFlags()
    eval: EvalFlags = EvalFlags()
    opd: OpdFlags = OpdFlags()
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
    def max_logprob_mismatch(self) -> float:
        """Nats per token. In fp32 a missed update of a small model shows; in bf16 rounding alone is about 0.01."""
        given = self.rollout.max_logprob_mismatch
        return given if given is not None else 0.1 if self.model.bf16 else 1e-3

    @property
    def kl_temperature(self) -> float:
        """Temperature of both distributions in the OPD penalty: a server's input log-probs are always at 1."""
        return self.rollout.rollout_temperature if self.opd.opd_type == "megatron" else 1.0

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
