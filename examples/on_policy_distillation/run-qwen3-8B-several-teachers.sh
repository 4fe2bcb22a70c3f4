#!/usr/bin/env bash
# One student, a teacher for each kind of prompt: Qwen3-8B learns mathematics from one 14B model and code from another.
# Each row of the data names its teacher in its metadata: {"prompt": ..., "label": ..., "metadata": {"teacher": "code"}}.
# Machine: 8 GPUs. The trainer takes 4, the student's rollout engines the other 4; the teachers are co-loaded and take
# turns on the trainer's devices.
#
#   bash examples/on_policy_distillation/run-qwen3-8B-several-teachers.sh [more train.py flags]
#
# Before: $BASE/Qwen3-8B_torch_dist as in run-qwen3-8B-opd.sh. PROMPTS, MATH_TEACHER and CODE_TEACHER name the data and
# the teachers' folders. COMBINE=probs has both score every token, as a mixture of their distributions. DRY_RUN=1 prints
# the plan and the memory instead and starts nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BASE=${BASE:-/root}
RUN=${RUN:-outputs/qwen3-8B-several-teachers}
STUDENT=Qwen3-8B
source scripts/models/qwen3-8B.sh
source scripts/lib/math_recipe.sh
source scripts/lib/launch.sh

DATA_ARGS=(
   --prompt-data "${PROMPTS:-$BASE/math_and_code.jsonl}"
)

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

OPD_ARGS=(
   --use-opd
   --opd-type megatron
   --opd-kl-coef 1.0
   --opd-teachers "math=${MATH_TEACHER:-$BASE/Qwen3-14B}" "code=${CODE_TEACHER:-$BASE/Qwen3-14B-code}"
   --opd-teacher-combine "${COMBINE:-route}"
)
# A coefficient of a teacher's own, relative to --opd-kl-coef; with a mixture there is one penalty for all.
[[ ${COMBINE:-route} != route ]] || OPD_ARGS+=(--opd-teacher-kl-coefs code=0.5)

start_training 4 \
   "${MODEL_ARGS[@]}" \
   "${RECIPE_ARGS[@]}" \
   "${DATA_ARGS[@]}" \
   "${ENGINE_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${OPD_ARGS[@]}" \
   "$@"
