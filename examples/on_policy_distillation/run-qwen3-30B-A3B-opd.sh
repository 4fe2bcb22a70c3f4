#!/usr/bin/env bash
# A mixture of experts as the student: Qwen3-30B-A3B learns from Qwen3-235B-A22B, on four machines of 8 GPUs, as a job of
# a Ray cluster. Two machines train (tensor 4, the 128 experts over 8 ranks), one rolls out, one serves the teacher.
#
#   ray start --head --num-gpus 8 --include-dashboard=true    on the first machine
#   ray start --address FIRST_MACHINE:6379 --num-gpus 8       on the others
#   bash examples/on_policy_distillation/run-qwen3-30B-A3B-opd.sh [more train.py flags]      on the first
#
# All machines have this repository and $BASE under the same path. TEACHER_URL names a server that runs already; then
# three machines do. DRY_RUN=1 prints the plan and the memory instead and needs no cluster.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BASE=${BASE:-/root}
RUN=${RUN:-$PWD/outputs/qwen3-30B-A3B-opd}
STUDENT=Qwen3-30B-A3B
source scripts/models/qwen3-30B-A3B.sh
source scripts/lib/math_recipe.sh
source scripts/lib/launch.sh

ENGINE_ARGS=(
   --rollout-engine sglang
   --rollout-num-gpus 8
   --rollout-num-gpus-per-engine 4
   --sglang-mem-fraction-static 0.8
   --sglang-weight-sync distributed
)

PERF_ARGS=(
   --actor-num-nodes 2
   --actor-num-gpus-per-node 8
   --tensor-model-parallel-size 4
   --sequence-parallel
   --expert-model-parallel-size 8
   --expert-tensor-parallel-size 1
)

OPD_ARGS=(
   --use-opd
   --opd-type sglang
   --opd-kl-coef 1.0
)
if [[ -n ${TEACHER_URL:-} ]]; then
   OPD_ARGS+=(--rm-url "$TEACHER_URL/generate")
else
   OPD_ARGS+=(--opd-teacher-serve "$BASE/Qwen3-235B-A22B" --opd-teacher-num-gpus 8 --opd-teacher-num-gpus-per-engine 8)
fi

submit_training \
   "${MODEL_ARGS[@]}" \
   "${RECIPE_ARGS[@]}" \
   "${ENGINE_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${OPD_ARGS[@]}" \
   "$@"
