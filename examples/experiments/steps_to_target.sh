#!/usr/bin/env bash
# Steps to a level of accuracy, each method at its own best learning rate: reward only (GRPO), penalty (OPD), both, and
# three distillation losses, on the laptop task.
#
#   bash examples/experiments/steps_to_target.sh tune     # every method at every rate of RATES, seed 41
#   bash examples/experiments/steps_to_target.sh          # every method at its rate in best_rates.txt, seeds 42 43 44
#   python examples/experiments/results.py outputs/experiments/steps_to_target
#
# SEEDS, RATES, METHODS: lists of other ones. GRPO gets 120 steps, the others 40 (30 while
# tuning). `tune` ends with the rates that got to 80% in
# the fewest steps (or, where none did, highest): what best_rates.txt holds. Complete runs are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/experiments/common.sh

METHODS=${METHODS:-opd hybrid reverse_kl forward_kl jsd grpo}
RATES=${RATES:-2e-4 4e-4 8e-4}
RUNS=$EXPERIMENTS/steps_to_target

main() {
   local method rate seed
   if [ "${1:-}" = tune ]; then
      RUN_STEPS=30
      for method in $METHODS; do
         for rate in $RATES; do one "$method" "$rate" 41 "$RUNS/tuning/$method@$rate"; done
      done
      python examples/experiments/best_rates.py "$RUNS/tuning"
      return
   fi
   for seed in $SEEDS; do
      for method in $METHODS; do one "$method" "$(best_rate "$method")" "$seed" "$RUNS/$method"; done
   done
}

one() {  # method, learning rate, seed, run folder without the seed
   local steps=$RUN_STEPS interval=5
   if [ "$1" = grpo ]; then steps=120 interval=10; fi
   run_method "$1" "$3" "$4-$3" "$steps" --lr "$2" --eval-interval "$interval"
}

main "$@"; exit  # on one line: an edit of this file does not reach a run that has begun
