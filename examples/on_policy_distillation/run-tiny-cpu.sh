#!/usr/bin/env bash
# The laptop run: a 0.6M-parameter student that forgets carries and borrows learns arithmetic from a teacher that does
# not. Real megatron-core, embedded rollout engine, co-loaded teacher; two CPU cores, no GPU.
#
#   bash examples/on_policy_distillation/run-tiny-cpu.sh [more train.py flags]
#
# OUTPUT_DIR=...  where results go (default outputs/tiny-cpu)
# RESUME=1        go on from the last checkpoint there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

TASK=examples/on_policy_distillation/tiny_task
OUTPUT_DIR=${OUTPUT_DIR:-outputs/tiny-cpu}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

CKPT_ARGS=(
   --hf-checkpoint "$TASK/student"
   --save "$OUTPUT_DIR/checkpoints"
   --save-interval 10
   ${RESUME:+--load "$OUTPUT_DIR/checkpoints"}
)
ROLLOUT_ARGS=(
   --prompt-data "$TASK/train.jsonl"
   --input-key prompt
   --label-key label
   --rollout-shuffle
   --rm-type final_answer
   --num-rollout 40
   --rollout-batch-size 16
   --n-samples-per-prompt 8
   --rollout-max-response-len 56
   --rollout-temperature 1.0
)
EVAL_ARGS=(
   --eval-interval 10
   --eval-prompt-data heldout "$TASK/eval.jsonl"
   --eval-temperature 0
)
OPD_ARGS=(
   --use-opd
   --opd-type megatron
   --opd-kl-coef 1.0
   --opd-teacher-load "$TASK/teacher"
)
GRPO_ARGS=(
   --advantage-estimator grpo
   --calculate-per-token-loss
   --eps-clip 0.2
)
OPTIMIZER_ARGS=(
   --lr 2e-4
   --lr-warmup-iters 3
   --adam-beta2 0.95
)

python train.py "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${OPD_ARGS[@]}" "${GRPO_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" --output-dir "$OUTPUT_DIR" "$@"
