#!/usr/bin/env bash
# Forgetting and recovery. The good model of the laptop task learns a price list, forgets how to work out its stories,
# and is brought back to them by on-policy distillation from its earlier self. What is left of the prices? Against it:
# three short rounds, two teachers, prices repeated on the way, stories rehearsed from the start.
#
#   bash examples/experiments/forgetting.sh
#   python examples/experiments/forgetting.py outputs/experiments/forgetting --picture forgetting.png
#
# SEEDS, WAYS: lists of other ones; the ways are the functions below. Every step has 64 answers. About 10 CPU minutes
# a seed; complete runs are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/experiments/common.sh

WAYS=${WAYS:-recover_reverse_kl recover_routed recover_mixed rounds rehearse}
RUNS=$EXPERIMENTS/forgetting
DATA=$RUNS/data
NEW_STEPS=80 RECOVERY_STEPS=30 ROUNDS=3 ROUND_NEW_STEPS=27 ROUND_RECOVERY_STEPS=10

EARLIER=(--use-opd --opd-type megatron --opd-teacher-load "$TASK/teacher")
MEASURE=(--custom-reward-post-process-path examples.on_policy_distillation.tiny_task.measure_only.measure_only)
PENALTY=("${EARLIER[@]}" --opd-kl-coef 1.0 "${MEASURE[@]}" --lr "$(best_rate opd)")
REVERSE_KL=("${EARLIER[@]}" --distillation-type reverse_kl --lr "$(best_rate reverse_kl)")
SUPERVISED=(--lr 1e-3 --lr-warmup-iters 10 --eval-interval 20)

main() {
   local seed way
   if [ ! -f "$DATA/both.jsonl" ]; then python "$TASK/make_second_task.py" --output-dir "$DATA"; fi
   for seed in $SEEDS; do
      learn prices "$seed" "$TASK/teacher" $NEW_STEPS "$DATA/prices.jsonl"
      for way in $WAYS; do "$way" "$seed" "$RUNS/prices-$seed/model"; done
   done
}

# Each way: seed, the model that knows the prices.

recover_reverse_kl() { run reverse_kl "$1" "$2" $RECOVERY_STEPS "${REVERSE_KL[@]}"; }

# Half of the prompts ask for prices, and the model that knows them is their teacher: both teachers are earlier selves.
# Twice the steps where two tasks share them: as many answers to each as where they do not.
recover_routed() {
   run routed "$1" "$2" $((2 * RECOVERY_STEPS)) --prompt-data "$DATA/both.jsonl" \
      --use-opd --opd-type megatron --opd-teachers "stories=$TASK/teacher" "prices=$2" \
      --distillation-type reverse_kl --lr "$(best_rate reverse_kl)"
}

# Half of the answers are the price list's, learned by their log-likelihood.
recover_mixed() {
   run mixed "$1" "$2" $((2 * RECOVERY_STEPS)) "${PENALTY[@]}" \
      --sft-data "$DATA/prices.jsonl" --opd-off-policy-fraction 0.5
}

# As many steps of either kind as one long round, from the good model.
rounds() {
   local round model=$TASK/teacher
   for round in $(seq $ROUNDS); do
      learn "round${round}_prices" "$1" "$model" $ROUND_NEW_STEPS "$DATA/prices.jsonl"
      run "round${round}_stories" "$1" "$RUNS/round${round}_prices-$1/model" $ROUND_RECOVERY_STEPS "${REVERSE_KL[@]}"
      model=$RUNS/round${round}_stories-$1/model
   done
}

# Nothing is forgotten in the first place: the good model learns prices beside right answers to stories.
rehearse() { learn rehearsal "$1" "$TASK/teacher" $((2 * NEW_STEPS)) "$DATA/both.jsonl"; }

learn() {  # name, seed, model to start from, steps, file with answers
   run "${@:1:4}" "${SUPERVISED[@]}" --sft-data "$5" --sft-steps "$4"
}

run() {  # name, seed, model to start from, steps, more flags; its model is the folder's model/
   local OUTPUT_DIR=$RUNS/$1-$2 steps=$4 RESUME= known=(--skip-eval-before-train)  # the run before measured it
   if [ -f "$OUTPUT_DIR/model/config.json" ] && grep -q "\"step\": $steps[,}]" "$OUTPUT_DIR/metrics.jsonl"; then
      echo "$OUTPUT_DIR: complete"
      return
   fi
   if [ "$3" = "$TASK/teacher" ]; then known=(); fi
   rm -rf "$OUTPUT_DIR"
   source "$TASK/args.sh"
   python train.py "${TINY_ARGS[@]}" --n-samples-per-prompt 4 --num-rollout "$steps" --save-interval "$steps" \
      --eval-prompt-data stories "$TASK/eval.jsonl" prices "$DATA/eval-prices.jsonl" "${known[@]}" \
      --hf-checkpoint "$3" --save-hf "$OUTPUT_DIR/model" --output-dir "$OUTPUT_DIR" \
      --seed "$2" --rollout-seed "$2" "${@:5}"
}

main "$@"; exit  # on one line: an edit of this file does not reach a run that has begun
