#!/usr/bin/env bash
# Qwen3-8B learns from a stronger checkpoint of the same vocabulary, co-loaded into the trainer: no teacher server.
# Machine: 8 GPUs. The trainer takes 4, the student's rollout engines the other 4 (devices 4 to 7).
#
#   source scripts/models/qwen3-8B.sh
#   python tools/convert_hf_to_torch_dist.py "${MODEL_ARGS[@]}" --hf-checkpoint $BASE/Qwen3-8B --save $BASE/Qwen3-8B_torch_dist
#   (the teacher likewise, into $TEACHER; a Hugging Face folder will do as well)
#   bash examples/on_policy_distillation/run-qwen3-8B-opd-megatron.sh [more train.py flags]
#
# DRY_RUN=1 prints the plan and the memory instead and starts nothing. BASE holds models and data.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BASE=${BASE:-/root}
RUN=${RUN:-outputs/qwen3-8B-opd-megatron}
TEACHER=${TEACHER:-$BASE/Qwen3-32B_torch_dist}
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
   --actor-num-nodes 1
   --actor-num-gpus-per-node 4
   --tensor-model-parallel-size 4  # a quarter of the 32B teacher beside the student while it scores
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --no-use-distributed-optimizer  # it shards over data-parallel ranks, and here is one
)

OPD_ARGS=(
   --use-opd
   --opd-type megatron
   --opd-kl-coef 1.0
   --opd-teacher-load "$TEACHER"
)

start_training 4 \
   "${MODEL_ARGS[@]}" \
   "${RECIPE_ARGS[@]}" \
   "${ENGINE_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${OPD_ARGS[@]}" \
   "$@"
