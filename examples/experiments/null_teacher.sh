#!/usr/bin/env bash
# The control without a teacher: tokens that the student itself gives less than one half are pushed down by a constant, alone
# and beside the task reward, at the learning rates that served the penalty and the reward best.
#
#   bash examples/experiments/null_teacher.sh
#   python examples/experiments/results.py outputs/experiments/{null_teacher,steps_to_target} \
#      --names null null_and_reward opd hybrid grpo
#
# SEEDS: a list of other ones. Compare with the runs of steps_to_target.sh. Complete runs are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/experiments/common.sh

RUNS=$EXPERIMENTS/null_teacher

main() {
   local seed
   for seed in $SEEDS; do
      run_method null "$seed" "$RUNS/null-$seed" "$RUN_STEPS" --lr "$(best_rate opd)"
      run_method null_hybrid "$seed" "$RUNS/null_and_reward-$seed" "$RUN_STEPS" --lr "$(best_rate hybrid)"
   done
}

main "$@"; exit  # on one line: an edit of this file does not reach a run that has begun
