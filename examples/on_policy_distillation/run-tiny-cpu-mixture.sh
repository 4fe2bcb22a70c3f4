#!/usr/bin/env bash
# The laptop run with answers that student and teacher write together: at every token from the distribution that is as
# far from the one as from the other. The teacher reads the answer before the problem, the student does not.
#
#   bash examples/on_policy_distillation/run-tiny-cpu-mixture.sh [more train.py flags]
#
# --mixture-alpha-scale 2 0      begins with the teacher nearly alone, ends with the student alone
# --distillation-type reverse_kl a loss on whole distributions, which needs no importance ratio
#
# OUTPUT_DIR=...  where results go (default outputs/tiny-cpu-mixture)
# RESUME=1        go on from the last checkpoint there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

TASK=examples/on_policy_distillation/tiny_task
OUTPUT_DIR=${OUTPUT_DIR:-outputs/tiny-cpu-mixture}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

source "$TASK/args.sh"

OPD_ARGS=(
   --use-opd
   --opd-type megatron
   --opd-kl-coef 1.0
   --opd-teacher-load "$TASK/teacher"
)
MIXTURE_ARGS=(
   --rollout-engine mixture
   --mixture-alpha-method kl_symmetry
   --mixture-teacher-prompt-template "Answer: {label}. {prompt}"
   --use-tis
)

python train.py "${TINY_ARGS[@]}" "${OPD_ARGS[@]}" "${MIXTURE_ARGS[@]}" --output-dir "$OUTPUT_DIR" "$@"
