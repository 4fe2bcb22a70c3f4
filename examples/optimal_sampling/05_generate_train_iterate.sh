#!/usr/bin/env bash
# Two rounds of: generate with the mixture, keep what is right, train the student on it. The second round's student is
# the one that the first round trained.
#
#   bash examples/optimal_sampling/05_generate_train_iterate.sh
#
# About 2 minutes of one idle core, half of it in 2 x 40 supervised steps; everything is left in
# outputs/optimal_sampling/rounds (OUTPUT_DIR=... for another place). Killed, it goes on with the answers that it has;
# training that was broken off starts again. Prints, per round, how many of 640 answers the filters kept and the
# student's greedy accuracy on 256 held-out problems before and after:
#
#   round 1: 434 answers kept, held-out accuracy 36.7% -> 89.1%
#   round 2: 586 answers kept, held-out accuracy 89.1% -> 98.4%
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

TASK=examples/on_policy_distillation/tiny_task
OUTPUT_DIR=${OUTPUT_DIR:-outputs/optimal_sampling/rounds}
STEPS=40  # of 64 answers each
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
source examples/optimal_sampling/rounds.sh

main() {
   local teacher student="$TASK/student" round folder
   teacher=$(python examples/optimal_sampling/tiny_pair.py)
   for round in 1 2; do
      folder=$OUTPUT_DIR/round$round
      mkdir -p "$folder"
      generate "$teacher" "$student" "$folder/answers.jsonl" \
         --seed "$round" --round "$round" --verify final_answer --require-finished
      if [ ! -f "$folder/student/config.json" ]; then
         train "$student" "$folder/answers.jsonl" "$folder"
      fi
      echo "round $round: $(wc -l <"$folder/answers.jsonl") answers kept, held-out accuracy $(accuracies "$folder/run")"
      student=$folder/student
   done
}

main "$@"; exit  # on one line: an edit of this file does not reach a run that has begun
