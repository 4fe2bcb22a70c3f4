#!/usr/bin/env bash
# Qwen3-8B learns the whole next-token distribution of Qwen3-14B: generalised Jensen-Shannon divergence (GKD) in place
# of the penalty on the sampled token. The teacher is co-loaded: the whole vocabulary does not go over HTTP.
# Machine: 8 GPUs. The trainer takes 4, the student's rollout engines the other 4.
#
#   bash examples/on_policy_distillation/run-qwen3-8B-gkd.sh [more train.py flags]
#
# Before: $BASE/Qwen3-8B_torch_dist as in run-qwen3-8B-opd.sh. BETA=0 is forward KL, 1 reverse KL, 0.5 between them.
# TOP_K=64 compares 64 tokens and the rest as one. DRY_RUN=1 prints the plan and the memory instead and starts nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BASE=${BASE:-/root}
RUN=${RUN:-outputs/qwen3-8B-gkd}
TEACHER=${TEACHER:-$BASE/Qwen3-14B}
STUDENT=Qwen3-8B
source scripts/models/qwen3-8B.sh
source scripts/lib/math_recipe.sh
source scripts/lib/launch.sh

ENGINE_ARGS=(
   --rollout-engine sglang
   --rollout-num-gpus 4
   --rollout-num-gpus-per-engine 1
   --sglang-mem-fraction-static 0.8
)

PERF_ARGS=(
   --actor-num-gpus-per-node 4
   --tensor-model-parallel-size 2
   --sequence-parallel
)

# No reward acts on the student: it is measured, and judges the evaluation.
GKD_ARGS=(
   --use-opd
   --opd-type megatron
   --opd-teacher-load "$TEACHER"
   --distillation-type gkd
   --distillation-beta "${BETA:-0.5}"
   --lr 5e-6
   --lr-decay-style linear
)
[[ -z ${TOP_K:-} ]] || GKD_ARGS+=(--distillation-top-k "$TOP_K")

start_training 4 \
   "${MODEL_ARGS[@]}" \
   "${RECIPE_ARGS[@]}" \
   "${ENGINE_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${GKD_ARGS[@]}" \
   "$@"
