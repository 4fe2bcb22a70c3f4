#!/usr/bin/env bash
# Qwen3-8B learns from Qwen3-32B; the teacher runs in an SGLang server that this script starts and stops.
# Machine: 8 GPUs. The trainer takes 4, the student's rollout engines 2 (devices 4 and 5), the teacher the last 2.
#
#   source scripts/models/qwen3-8B.sh
#   python tools/convert_hf_to_torch_dist.py "${MODEL_ARGS[@]}" --hf-checkpoint $BASE/Qwen3-8B --save $BASE/Qwen3-8B_torch_dist
#   bash examples/on_policy_distillation/run-qwen3-8B-opd.sh [more train.py flags]
#
# DRY_RUN=1 prints the plan and the memory instead and starts nothing. BASE holds models and data; TEACHER_URL names a
# server that is already running somewhere else, and then none is started here. scripts/lib/ has the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BASE=${BASE:-/root}
RUN=${RUN:-outputs/qwen3-8B-opd}
STUDENT=Qwen3-8B
source scripts/models/qwen3-8B.sh
source scripts/lib/math_recipe.sh
source scripts/lib/launch.sh

ENGINE_ARGS=(
   --rollout-engine sglang
   --rollout-num-gpus 2
   --rollout-num-gpus-per-engine 1
   --sglang-mem-fraction-static 0.8
)

PERF_ARGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node 4
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
)

serve_teacher "$BASE/Qwen3-32B" "${TEACHER_GPUS:-6,7}" \
   --tp-size 2 --mem-fraction-static 0.8 --chunked-prefill-size 4096

OPD_ARGS=(
   --use-opd
   --opd-type sglang
   --opd-kl-coef 1.0
   --rm-url "$TEACHER_URL/generate"
   --custom-rm-path opd.rewards.on_policy_distillation.reward_func
   --custom-reward-post-process-path opd.rewards.on_policy_distillation.post_process_rewards
)

export CUDA_VISIBLE_DEVICES=${TRAIN_GPUS:-0,1,2,3,4,5}
start_training 4 \
   "${MODEL_ARGS[@]}" \
   "${RECIPE_ARGS[@]}" \
   "${ENGINE_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${OPD_ARGS[@]}" \
   "$@"
