#!/usr/bin/env bash
# One student, taught by the reverse KL loss by teachers that differ in size, in training, or in what they read.
#
#   bash examples/experiments/teachers.sh make       # the teachers alone
#   bash examples/experiments/teachers.sh            # every condition of CONDITIONS
#   python examples/experiments/results.py outputs/experiments/{teachers,steps_to_target} \
#      --last-step 30 --names reverse_kl same_size larger no_context right_context wrong_context
#
# same_size, larger: fresh weights trained on correct chains, width 128 and 192. The run "reverse_kl" of
# steps_to_target.sh has the shipped teacher, from which the student was made. The contexts are three prompts of one
# teacher, who slips like the student and can copy a solution from its prompt (make_context.py).
# SEEDS, CONDITIONS: lists of other ones. Complete runs are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/experiments/common.sh
source "$TASK/warm_up.sh"

CONDITIONS=${CONDITIONS:-same_size larger no_context right_context wrong_context}
RUNS=$EXPERIMENTS/teachers
MADE=$RUNS/made
CONTEXT=$MADE/context
RUN_STEPS=30

main() {
   local condition seed
   for condition in $CONDITIONS; do make_teacher_of "$condition"; done
   if [ "${1:-}" = make ]; then return; fi
   for seed in $SEEDS; do
      for condition in $CONDITIONS; do
         flags_of "$condition"
         run_method reverse_kl "$seed" "$RUNS/$condition-$seed" "$RUN_STEPS" \
            --lr "$(best_rate reverse_kl)" "${FLAGS[@]}"
      done
   done
}

flags_of() {  # sets FLAGS to those of condition $1
   local behind=(--opd-teacher-load "$CONTEXT/hf" --prompt-data "$CONTEXT/data/train.jsonl")
   case $1 in
      same_size | larger) FLAGS=(--opd-teacher-load "$MADE/$1") ;;
      no_context) FLAGS=("${behind[@]}") ;;
      right_context) FLAGS=("${behind[@]}" --opd-teacher-prompt-template "{right} {prompt}") ;;
      wrong_context) FLAGS=("${behind[@]}" --opd-teacher-prompt-template "{wrong} {prompt}") ;;
      *) echo "no condition '$1'; choose from same_size larger no_context right_context wrong_context" >&2; exit 2 ;;
   esac
}

make_teacher_of() {  # condition
   flags_of "$1"  # ends the script where there is no such condition
   case $1 in
      same_size) fresh same_size 128 ;;
      larger) fresh larger 192 ;;
      *) reading ;;
   esac
}

fresh() {  # name, width
   if [ -f "$MADE/$1/config.json" ]; then return; fi
   python examples/experiments/make_teacher.py --width "$2" --output-dir "$MADE/$1"
}

# The student learns to copy a solution from its context and to slip without one: supervised steps of our own trainer.
reading() {
   if [ -f "$CONTEXT/hf/config.json" ]; then return; fi
   python examples/experiments/make_context.py --output-dir "$CONTEXT/data"
   rm -rf "$CONTEXT/checkpoints" "$CONTEXT/run"  # of one that was broken off
   warm_up "$CONTEXT/data/warmup.jsonl" 300 "$CONTEXT/checkpoints" "$CONTEXT/run" "$CONTEXT/hf" \
      without "$TASK/eval.jsonl" right "$CONTEXT/data/eval-right.jsonl" wrong "$CONTEXT/data/eval-wrong.jsonl"
}

main "$@"; exit  # on one line: an edit of this file does not reach a run that has begun
