#!/usr/bin/env bash
# Low-rank adapters (LoRA) against training all weights, by the penalty (OPD), each at its own best learning rate. The
# adapters' is tuned at rank 8 and serves all ranks, as they are scaled by 32 / rank. All weights are the run "opd" of
# steps_to_target.sh.
#
#   bash examples/experiments/lora.sh tune     # rank 8 at every rate of RATES, seed 41
#   bash examples/experiments/lora.sh          # every rank at the rate in best_rates.txt
#   python examples/experiments/results.py outputs/experiments/{lora,steps_to_target} --names rank_1 rank_8 rank_32 opd
#
# SEEDS, RATES, RANKS: lists of other ones. Complete runs are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/experiments/common.sh

RANKS=${RANKS:-1 8 32}
RATES=${RATES:-1e-3 2e-3 4e-3 8e-3}
RUNS=$EXPERIMENTS/lora

main() {
   local rank rate seed
   if [ "${1:-}" = tune ]; then
      RUN_STEPS=30
      for rate in $RATES; do adapters 8 "$rate" 41 "$RUNS/tuning/lora@$rate-41"; done
      python examples/experiments/best_rates.py "$RUNS/tuning"
      return
   fi
   for seed in $SEEDS; do
      for rank in $RANKS; do adapters "$rank" "$(best_rate lora)" "$seed" "$RUNS/rank_$rank-$seed"; done
   done
}

adapters() {  # rank, learning rate, seed, folder
   run_method opd "$3" "$4" "$RUN_STEPS" --lr "$2" --lora-rank "$1" --lora-alpha 32
}

main "$@"; exit  # on one line: an edit of this file does not reach a run that has begun
