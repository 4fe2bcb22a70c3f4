#!/usr/bin/env bash
# Qwen3-8B learns from a stronger checkpoint of the same vocabulary, co-loaded into the trainer: no teacher server.
# Machine: 8 GPUs. The trainer takes 4, the student's rollout engines the other 4 (devices 4 to 7).
#
#   source scripts/models/qwen3-8B.sh
#   python tools/convert_hf_to_torch_dist.py "${MODEL_ARGS[@]}" --hf-checkpoint $BASE/Qwen3-8B --save $BASE/Qwen3-8B_torch_dist
#   (the teacher likewise, into $TEACHER; a Hugging Face folder will do as well)
#   bash examples/on_policy_distillation/run-qwen3-8B-opd-megatron.sh
#
# DRY_RUN=1 prints the plan instead and starts nothing. BASE holds models and data.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BASE=${BASE:-/root}
RUN=${RUN:-outputs/qwen3-8B-opd-megatron}
TEACHER=${TEACHER:-$BASE/Qwen3-32B_torch_dist}
PYTHON=${PYTHON:-python}

source scripts/models/qwen3-8B.sh

CKPT_ARGS=(
   --hf-checkpoint "$BASE/Qwen3-8B"
   --ref-load "$BASE/Qwen3-8B_torch_dist"
   --load "$RUN/checkpoints"
   --save "$RUN/checkpoints"
   --save-interval 20
)

ROLLOUT_ARGS=(
   --prompt-data "$BASE/dapo-math-17k/dapo-math-17k.jsonl"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --num-rollout 300
   --rollout-batch-size 16
   --n-samples-per-prompt 4
   --rollout-max-response-len 16384
   --rollout-temperature 1.0
   --global-batch-size 64
)

ENGINE_ARGS=(
   --rollout-engine sglang
   --rollout-num-gpus 4
   --rollout-num-gpus-per-engine 1
   --sglang-mem-fraction-static 0.8
)

# The task reward is measured beside the teacher's scores, and judges the evaluation.
RM_ARGS=(
   --rm-type math
)

EVAL_ARGS=()
if [[ -n ${EVAL_DATA:-} ]]; then
   EVAL_ARGS=(
      --eval-interval 20
      --eval-prompt-data math500 "$EVAL_DATA"
      --n-samples-per-eval-prompt 1
      --eval-max-response-len 16384
   )
fi

PERF_ARGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node 4
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 16384
   --use-distributed-optimizer
   --bf16
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --eps-clip 0.2
   --eps-clip-high 0.28
)

OPD_ARGS=(
   --use-opd
   --opd-type megatron
   --opd-kl-coef 1.0
   --opd-teacher-load "$TEACHER"
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1e-6
   --lr-decay-style constant
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.98
)

LAUNCH=("$PYTHON" -m torch.distributed.run --nproc-per-node 4)
[[ -z ${DRY_RUN:-} ]] || LAUNCH=("$PYTHON")

"${LAUNCH[@]}" train.py \
   "${MODEL_ARGS[@]}" \
   "${CKPT_ARGS[@]}" \
   "${ROLLOUT_ARGS[@]}" \
   "${ENGINE_ARGS[@]}" \
   "${RM_ARGS[@]}" \
   "${EVAL_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${GRPO_ARGS[@]}" \
   "${OPD_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" \
   --output-dir "$RUN" \
   ${DRY_RUN:+--dry-run} "$@"
