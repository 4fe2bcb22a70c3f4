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

source "$TASK/args.sh"

OPD_ARGS=(
   --use-opd
   --opd-type megatron
   --opd-kl-coef 1.0
   --opd-teacher-load "$TASK/teacher"
)

python train.py "${TINY_ARGS[@]}" "${OPD_ARGS[@]}" --output-dir "$OUTPUT_DIR" "$@"
