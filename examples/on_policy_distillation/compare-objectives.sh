#!/usr/bin/env bash
# The objectives side by side on the laptop task: same student, prompts, batch, learning rate, steps and seeds.
#
#   bash examples/on_policy_distillation/compare-objectives.sh NAME SEED [more train.py flags]
#   bash examples/on_policy_distillation/compare-objectives.sh all [SEED ...]     # seeds 42 and 43 without any
#   python examples/experiments/objectives.py outputs/objectives
#
# A run writes outputs/objectives/NAME-SEED. One that is complete is skipped, one that was interrupted goes on. A run takes
# 1 to 2 minutes on one idle core, all of them for two seeds about an hour. NAME is one of those in NAMES below;
# flags_of says what each one is.
#
# OUTPUT_DIR=...  the folder of one run (default outputs/objectives/NAME-SEED)
# STEPS=...       its steps (default 40; grpo_long 120)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

TASK=examples/on_policy_distillation/tiny_task
ROOT=${OBJECTIVES_DIR:-outputs/objectives}
ROUTED_DATA=$ROOT/routed-data
ONE_FOLDER=${OUTPUT_DIR:-}
source "$TASK/privileged_teacher.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

NAMES="opd grpo hybrid reverse_kl forward_kl jsd top_k null null_hybrid hybrid_kl routed mixed privileged null_wide \
self_ema self_live null_faint"

# The task reward measures every run; it acts only where the comment says so.
FUNCTIONS=examples.on_policy_distillation.tiny_task
MEASURE=(--custom-reward-post-process-path "$FUNCTIONS.measure_only.measure_only")
COLOADED=(--use-opd --opd-type megatron --opd-teacher-load "$TASK/teacher")
HINT=(--opd-teacher-prompt-template "Answer: {label}. {prompt}")

flags_of() {  # sets FLAGS to those of objective $1
   case $1 in
      # Policy gradients. With coefficient 0 the teacher only tells the reverse KL.
      opd) FLAGS=("${COLOADED[@]}" "${MEASURE[@]}" --opd-kl-coef 1.0) ;;
      grpo) FLAGS=("${COLOADED[@]}" --opd-kl-coef 0.0) ;;  # task reward alone
      hybrid) FLAGS=("${COLOADED[@]}" --opd-kl-coef 1.0) ;;  # task reward and penalty, as in run-tiny-cpu.sh
      # Distribution losses over all 52 tokens, or the teacher's 8 likeliest and a bucket for the rest.
      reverse_kl) FLAGS=("${COLOADED[@]}" --distillation-type reverse_kl) ;;
      forward_kl) FLAGS=("${COLOADED[@]}" --distillation-type forward_kl) ;;
      jsd) FLAGS=("${COLOADED[@]}" --distillation-type gkd --distillation-beta 0.5) ;;
      top_k) FLAGS=("${COLOADED[@]}" --distillation-type reverse_kl --distillation-top-k 8) ;;
      hybrid_kl) FLAGS=("${COLOADED[@]}" --distillation-type reverse_kl --lambda-rl 1.0) ;;  # and task reward
      # Two teachers, one of whom is the untrained student: half of the prompts, or half of every token's mixture.
      routed) FLAGS=(--use-opd --opd-type megatron --opd-teachers "times=$TASK/teacher" "plus=$TASK/student"
         --prompt-data "$ROUTED_DATA/train.jsonl" --distillation-type reverse_kl) ;;
      mixed) FLAGS=(--use-opd --opd-type megatron --opd-teachers "good=$TASK/teacher" "sloppy=$TASK/student"
         --opd-teacher-combine probs --distillation-type reverse_kl) ;;
      # A teacher that slips like the student, and has been told the answer.
      privileged) FLAGS=(--use-opd --opd-type megatron --opd-teacher-load "$PRIVILEGED_TEACHER/hf" "${HINT[@]}"
         --distillation-type reverse_kl) ;;
      # The same weights are student and teacher, and only the teacher reads the hint.
      self_ema) FLAGS=(--use-opd --opd-type megatron --opd-teacher-self ema "${HINT[@]}"
         --hf-checkpoint "$PRIVILEGED_TEACHER/hf" --distillation-type reverse_kl) ;;
      self_live) FLAGS=(--use-opd --opd-type megatron --opd-teacher-self live "${HINT[@]}"
         --hf-checkpoint "$PRIVILEGED_TEACHER/hf" --distillation-type reverse_kl) ;;
      # Controls: a fixed negative advantage on tokens that the student itself found unlikely.
      null) FLAGS=("${COLOADED[@]}" "${MEASURE[@]}" --opd-kl-coef 0.0
         --custom-advantage-function-path "$FUNCTIONS.null_teacher.alone") ;;
      null_wide) FLAGS=("${COLOADED[@]}" "${MEASURE[@]}" --opd-kl-coef 0.0
         --custom-advantage-function-path "$FUNCTIONS.null_teacher.alone_wide") ;;
      null_hybrid) FLAGS=("${COLOADED[@]}" --opd-kl-coef 0.0
         --custom-advantage-function-path "$FUNCTIONS.null_teacher.beside_the_reward") ;;  # and task reward
      null_faint) FLAGS=("${COLOADED[@]}" --opd-kl-coef 0.0
         --custom-advantage-function-path "$FUNCTIONS.null_teacher.faint_beside_the_reward") ;;  # and task reward
      # Longer, for the steps that the task reward alone needs.
      grpo_long) FLAGS=("${COLOADED[@]}" --opd-kl-coef 0.0) ;;
      *) echo "no objective '$1'; choose one of $NAMES grpo_long" >&2; exit 2 ;;
   esac
}

main() {
   local name=${1:?usage: compare-objectives.sh NAME SEED [more train.py flags], or: all [SEED ...]}
   shift
   if [ "$name" = all ]; then
      ONE_FOLDER=""
      if [ $# = 0 ]; then set -- 42 43; fi
      for seed in "$@"; do
         for each in $NAMES; do run_one "$each" "$seed"; done
      done
   else
      run_one "$name" "${@:?the seed}"
   fi
}

run_one() {
   local name=$1 seed=$2
   shift 2
   flags_of "$name"
   OUTPUT_DIR=${ONE_FOLDER:-$ROOT/$name-$seed}
   local steps=${STEPS:-40}
   if [ "$name" = grpo_long ]; then steps=120; fi
   if is_complete "$OUTPUT_DIR" "$steps"; then
      echo "$OUTPUT_DIR: complete"
      return
   fi
   prepare_routed_data
   case $name in privileged | self_*) prepare_privileged_teacher ;; esac
   RESUME=1  # args.sh: go on from the last checkpoint, if there is one
   source "$TASK/args.sh"
   python train.py "${TINY_ARGS[@]}" \
      --eval-prompt-data heldout "$TASK/eval.jsonl" times "$ROUTED_DATA/eval-times.jsonl" \
         plus "$ROUTED_DATA/eval-plus.jsonl" \
      "${FLAGS[@]}" --num-rollout "$steps" --rollout-seed "$seed" --seed "$seed" --output-dir "$OUTPUT_DIR" "$@"
}

is_complete() {  # whether run $1 has recorded $2 steps
   [ -f "$1/metrics.jsonl" ] && grep -q "\"step\": $2[,}]" "$1/metrics.jsonl"
}

prepare_routed_data() {
   if [ ! -f "$ROUTED_DATA/eval-plus.jsonl" ]; then
      python "$TASK/make_routes.py" --output-dir "$ROUTED_DATA"
   fi
}

main "$@"; exit  # on one line: an edit of this file does not reach a run that has begun
