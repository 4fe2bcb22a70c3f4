#!/usr/bin/env bash
# How many different prompts does on-policy distillation need? The penalty (OPD) on 128 answers a step to 1, 4 or 16 prompts,
# the same ones in every step. With 16 new ones each step it is the run "opd" of steps_to_target.sh.
#
#   bash examples/experiments/single_prompt.sh
#   python examples/experiments/results.py outputs/experiments/{single_prompt,steps_to_target} \
#      --names prompts_1 prompts_4 prompts_16 opd
#
# SEEDS, PROMPTS: lists of other ones. A seed draws its own prompts. Complete runs are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/experiments/common.sh

PROMPTS=${PROMPTS:-1 4 16}
RUNS=$EXPERIMENTS/single_prompt
ANSWERS=128  # of a step

main() {
   local count seed data
   for seed in $SEEDS; do
      for count in $PROMPTS; do
         data=$RUNS/data/$count-$seed.jsonl
         draw_prompts "$count" "$seed" "$data"
         run_method opd "$seed" "$RUNS/prompts_$count-$seed" "$RUN_STEPS" --lr "$(best_rate opd)" \
            --prompt-data "$data" --rollout-batch-size "$count" --n-samples-per-prompt $((ANSWERS / count))
      done
   done
}

draw_prompts() {  # count, seed, file
   mkdir -p "$(dirname "$3")"
   python - "$1" "$2" "$TASK/train.jsonl" "$3" <<'PYTHON'
import pathlib
import random
import sys

count, seed, source, target = int(sys.argv[1]), int(sys.argv[2]), *map(pathlib.Path, sys.argv[3:])
rows = random.Random(seed).sample(source.read_text(encoding="utf-8").splitlines(keepends=True), count)
target.write_text("".join(rows), encoding="utf-8")
PYTHON
}

main "$@"; exit  # on one line: an edit of this file does not reach a run that has begun
