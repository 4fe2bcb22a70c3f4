#!/usr/bin/env bash
# Whose answers teach the student best: its own, the mixture's, or those of the teacher that reads the answer? Each
# writes two answers to 640 problems; the student learns from all of them, and again from the right ones alone.
#
#   bash examples/optimal_sampling/06_compare_sources.sh            # seed 1
#   SEEDS="1 2 3" bash examples/optimal_sampling/06_compare_sources.sh
#
# About 5 minutes a seed on one idle core; everything is left in outputs/optimal_sampling/sources (OUTPUT_DIR=...), and
# finished parts are not repeated. Prints a line per source; docs/experiments.md has the table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

TASK=examples/on_policy_distillation/tiny_task
OUTPUT_DIR=${OUTPUT_DIR:-outputs/optimal_sampling/sources}
STEPS=40  # of 64 answers each
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
source examples/optimal_sampling/rounds.sh

main() {
   local teacher seed engine kind folder
   teacher=$(python examples/optimal_sampling/tiny_pair.py)
   for seed in ${SEEDS:-1}; do
      for engine in student speculative teacher; do
         for kind in all right; do
            folder=$OUTPUT_DIR/$engine-$kind-$seed
            mkdir -p "$folder"
            filters=()
            if [ $kind = right ]; then filters=(--verify final_answer --require-finished); fi
            generate "$teacher" "$TASK/student" "$folder/answers.jsonl" \
               --engine $engine --seed "$seed" --samples-per-prompt 2 "${filters[@]}"
            if [ ! -f "$folder/student/config.json" ]; then
               train "$TASK/student" "$folder/answers.jsonl" "$folder" --seed "$seed" --rollout-seed "$seed"
            fi
            echo "seed $seed, $engine, $kind: $(wc -l <"$folder/answers.jsonl") of 1280 answers," \
               "held-out accuracy $(accuracies "$folder/run")"
         done
      done
   done
}

main "$@"; exit  # on one line: an edit of this file does not reach a run that has begun
