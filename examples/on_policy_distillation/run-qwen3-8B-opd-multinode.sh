#!/usr/bin/env bash
# Qwen3-8B learns from Qwen3-32B on two machines of 8 GPUs, as a job of a Ray cluster: training takes one machine, four
# rollout engines and one teacher server (tensor-parallel over 4) the other. The run starts the servers where Ray finds
# room, watches and stops them.
#
#   ray start --head --num-gpus 8 --include-dashboard=true    on the first machine
#   ray start --address FIRST_MACHINE:6379 --num-gpus 8       on the second
#   bash examples/on_policy_distillation/run-qwen3-8B-opd-multinode.sh [more train.py flags]      on the first
#
# Both machines have this repository and $BASE under the same path; before: $BASE/Qwen3-8B_torch_dist as in
# run-qwen3-8B-opd.sh. DRY_RUN=1 prints the plan and the memory instead and needs no cluster.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BASE=${BASE:-/root}
RUN=${RUN:-$PWD/outputs/qwen3-8B-opd-multinode}
STUDENT=Qwen3-8B
source scripts/models/qwen3-8B.sh
source scripts/lib/math_recipe.sh
source scripts/lib/launch.sh

ENGINE_ARGS=(
   --rollout-engine sglang
   --rollout-num-gpus 4
   --rollout-num-gpus-per-engine 1
   --sglang-mem-fraction-static 0.8
   --sglang-weight-sync distributed  # memory that two machines share there is none
)

PERF_ARGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node 8
   --tensor-model-parallel-size 2
   --sequence-parallel
)

OPD_ARGS=(
   --use-opd
   --opd-type sglang
   --opd-kl-coef 1.0
   --opd-teacher-serve "$BASE/Qwen3-32B"
   --opd-teacher-num-gpus 4
   --opd-teacher-num-gpus-per-engine 4
)

submit_training \
   "${MODEL_ARGS[@]}" \
   "${RECIPE_ARGS[@]}" \
   "${ENGINE_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${OPD_ARGS[@]}" \
   "$@"
