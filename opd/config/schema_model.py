"""Flags of the model and its training: checkpoints, shape, layout, adapters, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.schema_flag import flag


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    hf_checkpoint: str | None = flag(None, "Hugging Face folder of the student: tokenizer, config, and its weights unless --load or --ref-load holds some")
    ref_load: str | None = flag(None, "torch_dist folder with the student's initial weights, used when --load holds no checkpoint")
    load: str | None = flag(None, "torch_dist folder to resume from: weights, optimizer, scheduler, RNG, data cursor, step")
    save: str | None = flag(None, "folder for checkpoints (iter_NNNNNNN/ and latest_checkpointed_iteration.txt)")
    save_interval: int | None = flag(None, "save every this many rollouts, and at the end; without it only at the end")
    async_save: bool = flag(False, "go on training while a checkpoint is written, from a copy of weights and optimizer state in the host's memory")
    save_retain: int | None = flag(None, "keep the newest this many checkpoints of --save; all of them without it")
    save_retain_interval: int | None = flag(None, "keep checkpoints whose step is a multiple of this, and delete others but the newest (or --save-retain of them)")
    save_hf: str | None = flag(None, "with each checkpoint, also write the student as a Hugging Face folder; {rollout_id} in the name is the number of rollouts done, and without it each export replaces the one before")
    save_hf_shard_gb: float = flag(5.0, "with --save-hf, GB of one file with weights at most")
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
    num_experts: int | None = flag(None, "experts of each layer of a mixture of experts (Qwen3-MoE)")
    moe_router_topk: int | None = flag(None, "experts that a token goes to")
    moe_ffn_hidden_size: int | None = flag(None, "width of one expert")
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
    num_layers_per_virtual_pipeline_stage: int | None = flag(None, "interleaved pipeline: each stage holds several parts of the model, of this many layers each, which shortens the idle time at both ends of a step; one part without it")
    expert_model_parallel_size: int = flag(1, "ranks over which the experts of each layer are divided; they are taken from the data- and context-parallel ranks")
    expert_tensor_parallel_size: int | None = flag(None, "tensor-parallel ranks of one expert: 1, or --tensor-model-parallel-size as without it")
    actor_num_nodes: int = flag(1, "machines that train")
    actor_num_gpus_per_node: int = flag(1, "training ranks per machine")
    max_tokens_per_gpu: int = flag(4096, "tokens per micro-batch and rank; a longer sequence makes a micro-batch of its own")
    micro_batch_size: int | None = flag(None, "samples per micro-batch, in place of --max-tokens-per-gpu")
    balance_data: bool = flag(False, "accepted for slime scripts: data-parallel ranks always get about equally many tokens of each optimizer step")
    logits_chunk_tokens: int = flag(256, "response tokens whose logits exist at the same time; the rest are recomputed in the backward pass")
    use_dynamic_batch_size: bool = flag(False, "accepted for slime scripts: micro-batches follow --max-tokens-per-gpu unless --micro-batch-size is given")
    use_distributed_optimizer: bool = flag(False, "shard optimizer state over the data-parallel ranks")
    overlap_grad_reduce: bool = flag(False, "add up gradients over the data-parallel ranks while the backward pass still runs")
    overlap_param_gather: bool = flag(False, "with --use-distributed-optimizer and --overlap-grad-reduce, gather updated weights while the next forward pass already runs")
    gradient_accumulation_fusion: bool = flag(False, "add weight gradients to their buffer within the kernel that computes them; needs Transformer Engine or apex on a GPU, and is left out with a warning elsewhere")
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

    @property
    def data_parallel_size(self) -> int:
        """Ranks that hold a copy of the model each, with the ones they share it with."""
        return self.world_size // self.model_parallel_size


@dataclass(frozen=True, kw_only=True)
class ExpertFlags:
    """A mixture of experts. Which experts a token goes to is computed anew in training, as its log-prob is."""

    moe_router_load_balancing_type: str = flag("none", "aux_loss: a loss that spreads tokens evenly over the experts, weighted with --moe-aux-loss-coeff", choices=("none", "aux_loss"))
    moe_aux_loss_coeff: float = flag(0.0, "weight of the load-balancing loss, the mean over layers' micro-batches")
    moe_router_dtype: str | None = flag(None, "type in which the router computes; the model's own without it", choices=("fp32",))
    moe_router_score_function: str = flag("softmax", "accepted for Megatron scripts: the router's softmax is the model's", choices=("softmax",))
    moe_layer_freq: str | None = flag(None, "accepted for Megatron scripts: every layer has experts (1 or [1]*LAYERS)")
    moe_token_drop_policy: str = flag("probs", "accepted for Megatron scripts: no token is dropped", choices=("probs", "position"))
    moe_permute_fusion: bool = flag(False, "accepted for Megatron scripts: tokens are sorted without a fused kernel")
    moe_token_dispatcher_type: str = flag("alltoall", "how tokens reach their experts", choices=("alltoall",))
    moe_grouped_gemm: bool = flag(False, "accepted for Megatron scripts: the experts of a rank are one multiplication where Transformer Engine is installed, and run one by one elsewhere")


@dataclass(frozen=True, kw_only=True)
class LaunchFlags:
    """Who starts the processes: one rank runs in this process, torchrun starts several, Ray places them on machines."""

    launcher: str = flag("auto", "who starts the training ranks: local (this process is one of them: python, or torchrun for several), ray (placed by Ray and started by this process) or auto (ray when --ray-address or RAY_ADDRESS is given, or several ranks are asked for outside torchrun)", choices=("auto", "local", "ray"))
    ray_address: str | None = flag(None, "HOST:PORT of a running Ray cluster, of which this machine is a node; RAY_ADDRESS, else a cluster of this machine alone that the run starts and stops")
    ray_cpus_per_process: float = flag(1.0, "CPUs, as Ray counts them, that each training rank and each SGLang engine reserves")
    ray_timeout: float = flag(300.0, "seconds to wait until the Ray cluster has the devices that the run asks for")
    colocate: bool = flag(False, "over Ray, SGLang rollout engines share the devices of the training ranks instead of reserving --rollout-num-gpus of their own")


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
