#!/usr/bin/env bash
# The laptop run with answers that student and teacher write together: every token comes from the distribution that is
# as far from the one as from the other. The teacher is told the answer before the problem, the student is not.
#
#   bash examples/on_policy_distillation/run-tiny-cpu-mixture.sh [more train.py flags]
#
# The teacher, which slips like the student unless it is told the answer, is made first (2 minutes, once); the run takes
# 2 more. Flags to try: --mixture-alpha-scale 2 0 (from the teacher to the student alone), --mixture-alpha-method fixed
# --mixture-fixed-alpha 0.8, --rollout-engine torch (the student's own answers: plain on-policy distillation).
#
# OUTPUT_DIR=...      where results go (default outputs/tiny-cpu-mixture)
# OBJECTIVES_DIR=...  where the teacher goes (default outputs/objectives, shared with compare-objectives.sh)
# RESUME=1            go on from the last checkpoint there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

TASK=examples/on_policy_distillation/tiny_task
ROOT=${OBJECTIVES_DIR:-outputs/objectives}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/tiny-cpu-mixture}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

source "$TASK/args.sh"
source "$TASK/privileged_teacher.sh"

OPD_ARGS=(
   --use-opd
   --opd-type megatron
   --opd-teacher-load "$PRIVILEGED_TEACHER/hf"
   --opd-teacher-prompt-template "Answer: {label}. {prompt}"
   --distillation-type reverse_kl
)
MIXTURE_ARGS=(
   --rollout-engine mixture  # with the teacher and the prompt above
   --mixture-alpha-method kl_symmetry
)

prepare_privileged_teacher
python train.py "${TINY_ARGS[@]}" "${OPD_ARGS[@]}" "${MIXTURE_ARGS[@]}" --output-dir "$OUTPUT_DIR" "$@"
