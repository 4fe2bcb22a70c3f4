#!/usr/bin/env bash
# Whose answers teach the student best: its own, the mixture's, or those of the teacher that reads the answer? Each
# writes two answers to 640 problems; the student learns from all of them, and again from the right ones alone.
#
#   bash examples/optimal_sampling/06_compare_sources.sh            # seed 1
#   SEEDS="1 2 3" bash examples/optimal_sampling/06_compare_sources.sh
#   ROUNDS=2 KINDS=right bash examples/optimal_sampling/06_compare_sources.sh
#
# ROUNDS=2: the student that the first round trained writes new answers, alone or in the mixture, and learns from them.
# KINDS, ENGINES: a part of "all right" and of "student speculative teacher". About 5 minutes a seed on one idle core;
# everything is left in outputs/optimal_sampling/sources (OUTPUT_DIR=...), and finished parts are not repeated. Prints a
# line per source and round; docs/experiments.md has the table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

TASK=examples/on_policy_distillation/tiny_task
OUTPUT_DIR=${OUTPUT_DIR:-outputs/optimal_sampling/sources}
STEPS=40  # of 64 answers each
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
source examples/optimal_sampling/rounds.sh

main() {
   local teacher seed engine kind
   teacher=$(python examples/optimal_sampling/tiny_pair.py)
   for seed in ${SEEDS:-1}; do
      for engine in ${ENGINES:-student speculative teacher}; do
         for kind in ${KINDS:-all right}; do one_source "$teacher" "$seed" "$engine" "$kind"; done
      done
   done
}

one_source() {
   local teacher=$1 seed=$2 engine=$3 kind=$4
   local round filters=() student=$TASK/student folder=$OUTPUT_DIR/$engine-$kind-$seed
   if [ "$kind" = right ]; then filters=(--verify final_answer --require-finished); fi
   for round in $(seq "${ROUNDS:-1}"); do
      if [ "$round" -gt 1 ]; then folder=$OUTPUT_DIR/$engine-$kind-$seed/round$round; fi
      mkdir -p "$folder"
      generate "$teacher" "$student" "$folder/answers.jsonl" \
         --engine "$engine" --seed "$seed" --round "$round" --samples-per-prompt 2 "${filters[@]}"
      if [ ! -f "$folder/student/config.json" ]; then
         train "$student" "$folder/answers.jsonl" "$folder" --seed "$seed" --rollout-seed "$seed"
      fi
      student=$folder/student
      echo "seed $seed, $engine, $kind, round $round: $(wc -l <"$folder/answers.jsonl") of 1280 answers," \
         "held-out accuracy $(accuracies "$folder/run")"
   done
}

main "$@"; exit  # on one line: an edit of this file does not reach a run that has begun
