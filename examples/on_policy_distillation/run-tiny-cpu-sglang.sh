#!/usr/bin/env bash
# The laptop run on SGLang: the student generates and the teacher scores in real SGLang servers, on the CPU.
#
#   bash examples/on_policy_distillation/run-tiny-cpu-sglang.sh [more train.py flags]
#
# OUTPUT_DIR=...    where results go (default outputs/tiny-cpu-sglang)
# TEACHER_PORT=...  the teacher's port (default 30031)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/lib/sglang_server.sh

TASK=examples/on_policy_distillation/tiny_task
OUTPUT_DIR=${OUTPUT_DIR:-outputs/tiny-cpu-sglang}
TEACHER_PORT=${TEACHER_PORT:-30031}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

source "$TASK/args.sh"

ENGINE_ARGS=(
   --rollout-engine sglang
)
OPD_ARGS=(
   --use-opd
   --opd-type sglang
   --opd-kl-coef 1.0
   --rm-url "http://127.0.0.1:$TEACHER_PORT/generate"
   --custom-rm-path opd.rewards.on_policy_distillation.reward_func
   --custom-reward-post-process-path opd.rewards.on_policy_distillation.post_process_rewards
)

start_sglang_server "$TASK/teacher" "$TEACHER_PORT" "$OUTPUT_DIR/teacher.log"
wait_for_server "http://127.0.0.1:$TEACHER_PORT" 180

python train.py "${TINY_ARGS[@]}" "${ENGINE_ARGS[@]}" "${OPD_ARGS[@]}" --output-dir "$OUTPUT_DIR" "$@"
