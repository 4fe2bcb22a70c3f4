"""Flags of slime's launch scripts that the schema does not have, and what becomes of each: renamed, passed on to the
SGLang servers, ignored or refused. A flag that the schema has means the same here and is not listed.

``opd.config.slime_flags`` applies the table; ``docs/from_slime.md`` shows it. Names are without their dashes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["renamed", "passed on", "ignored", "refused"]


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """
    Args:
        why: for a warning or a refusal: sentences that follow the flag's name.
        words: "renamed": the flag here, and its value where that changes too (else the script's value follows).
    """

    kind: Kind
    why: str = ""
    words: tuple[str, ...] = ()


def _renamed(*words: str, why: str = "") -> Treatment:
    return Treatment(kind="renamed", words=words, why=why)


def _ignored(why: str) -> Treatment:
    return Treatment(kind="ignored", why=why)


def _refused(why: str) -> Treatment:
    return Treatment(kind="refused", why=why)


# One value of a flag, where other values of it fare differently. The flag itself may be one of the schema's.
VALUES: dict[tuple[str, str], Treatment] = {
    ("rm-type", "deepscaler"): _renamed(
        "--rm-type", "math", why="math-verify judges the last boxed answer, in place of slime's own parser."
    ),
    **{
        ("rm-type", name): _refused(
            "that rule is not here. Give --rm-type math, or name a function of your own with --custom-rm-path."
        )
        for name in ("dapo", "f1", "gpqa", "ifbench", "remote_rm", "random")
    },
    ("advantage-estimator", "on_policy_distillation"): _refused(
        "distillation goes with any estimator and is none itself. Give --use-opd --opd-type sglang and "
        "--advantage-estimator grpo; without a task reward only the teacher acts."
    ),
    ("opd-type", "self"): _refused(
        "the student as its own teacher is --opd-type megatron --opd-teacher-self live, frozen or ema."
    ),
    ("rollout-function-path", "slime.rollout.sglang_rollout.generate_rollout"): _ignored("it is what happens anyway."),
    **{
        ("rollout-function-path", f"{module}.generate_rollout_fully_async"): _refused(
            "rollouts in the background are --async-rollout. Give that in its place."
        )
        for module in ("slime.rollout.fully_async_rollout", "fully_async_rollout")
    },
    ("rollout-function-path", "slime.rollout.sft_rollout.generate_rollout"): _refused(
        "training on answers from a file is --sft-data FILE --sft-steps N. Give these in its place."
    ),
    ("rollout-function-path", "opd.plugins.slime.generate_rollout"): _refused(
        "that function is for slime itself. Here answers from the mixture are --rollout-engine mixture --use-tis."
    ),
    ("train-backend", "megatron"): _ignored("Megatron is the only trainer."),
    ("loss-type", "policy_loss"): _ignored("it is what happens anyway."),
    ("loss-type", "sft_loss"): _refused("that loss is of --sft-data. Give it with --sft-steps N."),
    ("loss-type", "topk_opd_loss"): _refused(
        "that loss is --distillation-type reverse_kl --distillation-top-k K --distillation-support student."
    ),
    ("pg-loss-type", "ppo"): _ignored("it is what happens anyway."),
    ("tis-level", "token"): _ignored("--use-tis weighs tokens."),
    ("update-weight-mode", "full"): _ignored("every weight is sent."),
    ("update-weight-transport", "nccl"): _renamed("--sglang-weight-sync", "distributed"),
    ("update-weight-transport", "disk"): _renamed("--sglang-weight-sync", "disk"),
    ("rollout-data-transport", "object-store"): _ignored("how data travels is no choice here."),
    ("flush-cache-interval", "1"): _ignored("it is what happens anyway."),
    ("log-probs-chunk-size", "-1"): _ignored("--logits-chunk-tokens has a default."),
    ("moe-token-dispatcher-type", "flex"): _refused("tokens reach their experts by alltoall. Give that."),
    ("moe-token-dispatcher-type", "allgather"): _refused("tokens reach their experts by alltoall. Give that."),
    ("transformer-impl", "transformer_engine"): _ignored("it is used where it is installed, for bf16 on CUDA."),
    ("transformer-impl", "local"): _ignored("Transformer Engine is used where it is installed, for bf16 on CUDA."),
}

RENAMED: dict[str, Treatment] = {
    "log-probs-chunk-size": _renamed("--logits-chunk-tokens"),
    "sglang-server-concurrency": _renamed("--rollout-max-running-requests"),
    "sglang-router-request-timeout-secs": _renamed("--sglang-request-timeout"),
    "use-slime-router": _renamed("--use-sglang-router", why="SGLang's own router serves."),
}

# SGLang's own server flags. slime has every one of them with this prefix; these are in use in its scripts.
PASSED_ON = frozenset(
    f"sglang-{name}"
    for name in """attention-backend chunked-prefill-size cuda-graph-bs cuda-graph-max-bs data-parallel-size
    decode-attention-backend deepep-mode disable-cuda-graph disable-radix-cache dp-size enable-deepep-moe
    enable-deterministic-inference enable-dp-attention enable-dp-lm-head enable-ep-moe ep-size expert-parallel-size
    log-level max-prefill-tokens max-total-tokens moe-a2a-backend moe-dense-tp-size moe-runner-backend page-size
    prefill-attention-backend schedule-conservativeness schedule-policy sampling-backend watchdog-timeout""".split()
)

_IGNORED: dict[str, str] = {
    "WANDB_API_KEY or `wandb login` gives the key; on a command line anyone on the machine can read it.": "wandb-key",
    "W&B reads WANDB_BASE_URL and WANDB_ENTITY.": "wandb-host wandb-team",
    "W&B's files, and the id that a resumed run goes on with, are in --output-dir.": "wandb-dir wandb-run-id",
    "W&B names the run.": "disable-wandb-random-suffix",
    "every metric is logged by rollout.": "wandb-always-use-train-step",
    "TensorBoard's files are in OUTPUT_DIR/tensorboard.": "tb-project-name tb-experiment-name",
    "OUTPUT_DIR/samples has samples with their per-token values; --num-saved-samples says how many.": (
        "save-debug-rollout-data save-debug-train-data dump-details log-multi-turn"
    ),
    "docs/metrics.md has what is logged.": (
        "log-passrate log-reward-category log-correct-samples use-rollout-entropy get-mismatch-metrics"
    ),
    "the optimizer's state stays on the training device; --dry-run says what that takes.": (
        "optimizer-cpu-offload optimizer-offload-fraction overlap-cpu-optimizer-d2h-h2d use-precision-aware-optimizer"
    ),
    "weights go over in pieces of a size of our own.": "update-weight-buffer-size",
    "the folder for weights is in --output-dir.": "update-weight-disk-dir update-weight-disk-keep-files",
    "an engine that dies is always started again; --sglang-max-restarts says how often.": "use-fault-tolerance",
    "an engine's death is noticed by its process and its answers, not by a timer.": (
        "rollout-health-check-interval rollout-health-check-timeout rollout-health-check-first-wait "
        "rollout-cleanup-timeout"
    ),
    "log-probs are computed in micro-batches of --max-tokens-per-gpu.": "log-probs-max-tokens-per-gpu",
    "logits are always recomputed in the backward pass.": "recompute-loss-function",
    "the model's family comes from its config.json.": "model-name",
    "mbridge converts between Hugging Face and Megatron.": "megatron-to-hf-mode",
    "gloo serves on a CPU, NCCL on CUDA.": "distributed-backend",
    "answers are packed without padding.": "data-pad-size-multiplier variable-seq-lengths seq-length",
    "the prompts come from one file.": "rollout-global-dataset loss-mask-type rollout-task-type",
    "samples are trained on in the rollout that wrote them.": "buffer-sort-by-staleness",
    "the answer's text keeps its special tokens; the reward rules leave those at its end out.": (
        "rollout-skip-special-tokens"
    ),
    "evaluation prompts have the model's whole context.": "eval-max-prompt-len eval-max-context-len",
    "use --prometheus-port and docs/metrics.md to watch a run.": (
        "memory-recorder memory-snapshot-dir memory-snapshot-num-steps record-memory-history"
    ),
    "after each weight sync the engine's log-probs are compared with the trainer's anyway (--max-logprob-mismatch).": (
        "check-weight-update-equal"
    ),
    "HTTP goes to the servers directly.": "http-proxy use-distributed-post",
    "attention is packed by Megatron's own rule.": "allgather-cp",
    "batches do not travel by file.": "rollout-data-dir rollout-io-concurrency",
    "Ray says how many devices a machine has.": "num-gpus-per-node",
    "who gives its memory to whom follows from --colocate.": (
        "offload offload-train offload-rollout no-offload-train no-offload-rollout"
    ),
    "tokens are what is balanced.": "balance-by-flops",
    "fused kernels are used where there are some.": (
        "no-masked-softmax-fusion no-rope-fusion no-bias-swiglu-fusion cross-entropy-loss-fusion "
        "cross-entropy-fusion-impl"
    ),
}

_NO_HOOK = "there is no such hook. Train with the built-in order, or run it inside slime with `opd.plugins.slime`."
_FAMILIES = "the model families here (Qwen2, Qwen3, Llama 3) have no such part. Train another model, or use slime."
_REFUSED: dict[str, str] = {
    _NO_HOOK: (
        "rollout-function-path eval-function-path custom-generate-function-path rollout-sample-hook-path "
        "custom-rollout-log-function-path custom-eval-rollout-log-function-path buffer-filter-path "
        "rollout-data-postprocess-path data-source-path custom-tis-function-path "
        "custom-pg-loss-reducer-function-path custom-convert-samples-to-train-data-path rollout-sample-filter-path "
        "rollout-all-samples-process-path custom-megatron-init-path custom-megatron-before-log-prob-hook-path "
        "custom-megatron-before-train-step-hook-path custom-model-provider-path custom-update-weight-post-write-path "
        "custom-config-path"
    ),
    (
        "an objective of your own is --distillation-type custom --custom-divergence-function-path, or "
        "--custom-advantage-function-path. Give one of these."
    ): "custom-loss-function-path",
    "every prompt that is drawn is trained on: a teacher has something to say about each answer. Drop it.": (
        "dynamic-sampling-filter-path"
    ),
    "a run's length is in rollouts. Give --num-rollout: epochs x prompts / --rollout-batch-size.": "num-epoch",
    "warm-up is in optimizer steps. Give --lr-warmup-iters.": "lr-warmup-fraction lr-warmup-samples lr-decay-samples",
    "text is not searched for stop words. Give their ids with --rollout-stop-token-ids.": "rollout-stop",
    "prompts are text. Drop it.": "multimodal-keys tool-key eval-tool-key",
    "evaluation sets are given as NAME PATH pairs. Give --eval-prompt-data.": "eval-config",
    "an answer ends where the model ends it. Drop it.": "eval-min-new-tokens",
    "a resumed run finds its step in --load. Drop it.": "start-rollout-id",
    "the newest checkpoint in the folder is read. Drop it.": "ref-ckpt-step ckpt-step",
    "the reference model is that of the start. Drop it.": "ref-update-interval",
    "a reward is one number per sample. Return a float from --custom-rm-path.": (
        "reward-key eval-reward-key group-rm disable-rewards-normalization"
    ),
    "advantages are always computed. For answers from a file give --sft-data.": (
        "disable-compute-advantages-and-returns"
    ),
    "a run writes and trains. --dry-run checks the flags; tools/ and benchmarks/ have the parts.": (
        "debug-rollout-only debug-train-only load-debug-rollout-data load-debug-rollout-data-subsample"
    ),
    "losses are chosen with --advantage-estimator, --distillation-type and --sft-data. Give these.": (
        "loss-type pg-loss-type use-score-centering score-centering-top-k use-opsm opsm-delta use-unbiased-kl"
    ),
    "the ratio that the loss clips is the trainer's. Give --use-tis to weigh by the engine's log-probs.": (
        "use-rollout-logprobs tis-level"
    ),
    "AdamW with its state is the optimizer. Drop it.": "reset-optimizer-states use-stateless-adam",
    "every checkpoint can be resumed from. Drop it.": "no-save-optim no-save-rng",
    "experts are chosen anew in every pass. Drop it.": (
        "use-routing-replay use-rollout-routing-replay routing-replay-prefetch-microbatches"
    ),
    "training is in bf16 or fp32. Drop it.": (
        "fp16 fp8-format fp8-recipe fp8-param-gather force-fp8-ue8m0-scale megatron-deepgemm-forward-layers "
        "megatron-deepgemm-forward-modules megatron-deepgemm-moe-forward-layers megatron-deepgemm-moe-forward-modules"
    ),
    _FAMILIES: (
        "multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim mtp-num-layers "
        "mtp-loss-scaling-factor enable-mtp-training post-self-attn-layernorm post-mlp-layernorm use-gated-attention "
        "attention-output-gate qwen-gdn-backend freeze-indexer spec apply-layernorm-1p rope-type rotary-scaling-factor "
        "moe-shared-expert-intermediate-size moe-shared-expert-gate moe-router-pre-softmax moe-router-num-groups "
        "moe-router-group-topk moe-router-topk-scaling-factor moe-router-enable-expert-bias moe-router-bias-update-rate"
    ),
    "all weights are trained, or adapters. Give --lora-rank for adapters.": (
        "only-train-params-name-list freeze-params-name-list"
    ),
    "actor and critic share their flags but --critic-lr and its kin. Drop it.": "megatron-config-path",
    "whole weights are sent, from a trainer that stays. Drop it.": (
        "update-weight-mode update-weight-transport update-weight-delta-encoding update-weight-delta-checksum "
        "update-weight-local-checkpoint-dir release-train flush-cache-interval"
    ),
    "the run starts its own engines. Give --rollout-num-gpus and --rollout-num-gpus-per-engine.": (
        "rollout-external-engine-addrs sglang-router-ip sglang-router-port sglang-config"
    ),
    "an engine serves weights of the training precision. Drop it.": (
        "sglang-dtype sglang-kv-cache-dtype sglang-quantization"
    ),
    "the run sets it. Give --rollout-max-context-len.": "sglang-context-length",
    "the run sets it. Give --rollout-max-running-requests.": "sglang-max-running-requests",
    "the environment is given to the launcher (`ray job submit --runtime-env-json`, or the shell). Drop it.": (
        "train-env-vars"
    ),
    "batches stay in memory. Drop it.": (
        "rollout-data-transport rollout-storage-profile rollout-storage-declaration rollout-queue-run-id "
        "rollout-queue-online-gc rollout-queue-lease-seconds rollout-queue-segment-mib rollout-session-id "
        "rollout-buffer-url fetch-trajectory-retry-times min-batch-collection-ratio load-forge-rollout-data "
        "disable-rollout-global-dataset"
    ),
    "Megatron is the only trainer. Drop it.": "train-backend",
    "kernels on CUDA are not bit-exact from run to run. Drop it; on a CPU the run is deterministic anyway.": (
        "deterministic-mode"
    ),
    "the kernels are Megatron's choice. Drop it.": "transformer-impl",
    "several teachers are --opd-teachers NAME=FOLDER ...; mixed ones --opd-teacher-combine probs.": "opd-teacher-loads",
    "whole or top-k distributions are compared with --distillation-type and --distillation-top-k K.": (
        "topk-level-opd opd-top-k opsd-beta opsd-jsd-clip"
    ),
    "a teacher that sees more is --opd-teacher-prompt-key or --opd-teacher-prompt-template.": (
        "opsd-privileged-info-key"
    ),
    "slime's own tests use it. Drop it.": (
        "ci-test ci-disable-kl-checker ci-train-rollout-logprob-abs-diff-threshold ci-save-grad-norm ci-load-grad-norm"
    ),
    "pipeline stages have equally many layers. Drop it.": (
        "decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers pipeline-model-parallel-layout"
    ),
    "tokens reach their experts by alltoall. Drop it.": "moe-enable-deepep moe-deepep-num-sms",
    "the vocabulary is padded with --make-vocab-size-divisible-by. Give that.": "padded-vocab-size",
}


def _by_name(groups: dict[str, str], kind: Kind) -> dict[str, Treatment]:
    return {name: Treatment(kind=kind, why=why) for why, names in groups.items() for name in names.split()}


FLAGS: dict[str, Treatment] = {
    **RENAMED,
    **{name: Treatment(kind="passed on") for name in PASSED_ON},
    **_by_name(_IGNORED, "ignored"),
    **_by_name(_REFUSED, "refused"),
}
