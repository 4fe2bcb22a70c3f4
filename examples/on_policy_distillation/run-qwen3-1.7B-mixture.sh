#!/usr/bin/env bash
# Answers that student and teacher write together: every token of the rollouts comes from the distribution between
# Qwen3-1.7B and Qwen3-4B, from nearly the teacher's (first rollout) to the student's own (rollout 100).
# Machine: 1 GPU of 80 GB: this engine decodes both models in the trainer's process.
#
#   bash examples/on_policy_distillation/run-qwen3-1.7B-mixture.sh [more train.py flags]
#
# Before: $BASE/Qwen3-1.7B_torch_dist, made as in run-qwen3-8B-opd.sh. SCALE="1 1" stays between the two throughout.
# DRY_RUN=1 prints the plan and the memory instead and starts nothing. docs/objectives.md has the schedule and metrics.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BASE=${BASE:-/root}
RUN=${RUN:-outputs/qwen3-1.7B-mixture}
TEACHER=${TEACHER:-$BASE/Qwen3-4B}
STUDENT=Qwen3-1.7B
source scripts/models/qwen3-1.7B.sh
source scripts/lib/math_recipe.sh
source scripts/lib/launch.sh

read -r START END <<<"${SCALE:-2 0}"
MIXTURE_ARGS=(
   --rollout-engine mixture
   --mixture-alpha-method kl_symmetry
   --mixture-alpha-scale "$START" "$END"
   --mixture-schedule-steps 100
   --rollout-max-response-len 2048
   --rollout-max-running-requests 32  # both models' caches are on the device
   --use-tis
)

PERF_ARGS=(
   --actor-num-gpus-per-node 1
   --no-use-distributed-optimizer
   --max-tokens-per-gpu 8192
)

OPD_ARGS=(
   --use-opd
   --opd-type megatron
   --opd-kl-coef 1.0
   --opd-teacher-load "$TEACHER"
)

start_training 1 \
   "${MODEL_ARGS[@]}" \
   "${RECIPE_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${MIXTURE_ARGS[@]}" \
   "${OPD_ARGS[@]}" \
   "$@"
