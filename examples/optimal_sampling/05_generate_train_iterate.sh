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
#   round 1: 434 answers kept, held-out accuracy 36.7% -> 91.8%
#   round 2: 593 answers kept, held-out accuracy 91.8% -> 97.7%
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

TASK=examples/on_policy_distillation/tiny_task
OUTPUT_DIR=${OUTPUT_DIR:-outputs/optimal_sampling/rounds}
STEPS=40  # of 64 answers each
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

main() {
   local teacher student="$TASK/student" round folder
   teacher=$(python examples/optimal_sampling/tiny_pair.py)
   for round in 1 2; do
      folder=$OUTPUT_DIR/round$round
      mkdir -p "$folder"
      generate "$round" "$teacher" "$student" "$folder/answers.jsonl"
      if [ ! -f "$folder/student/config.json" ]; then
         train "$student" "$folder"
      fi
      report "$round" "$folder"
      student=$folder/student
   done
}

# The teacher reads the answer, the student does not; wrong and unfinished answers are dropped.
generate() {  # round, teacher, student, file to write
   python tools/generate_mixture_data.py \
      --input "$TASK/train.jsonl" --input-key prompt --label-key label --limit 640 \
      --teacher "$2" --theta "$3" \
      --teacher-template "Answer: {label}. {prompt}" --theta-template "{prompt}" \
      --max-tokens 56 --seed "$1" --round "$1" \
      --verify final_answer --require-finished \
      --output "$4"
}

# Supervised steps on the answers' tokens, and the trained weights as a Hugging Face folder.
train() {  # student, folder of the round
   rm -rf "$2/checkpoints" "$2/run"
   python train.py \
      --hf-checkpoint "$1" --save "$2/checkpoints" --output-dir "$2/run" \
      --prompt-data "$TASK/train.jsonl" --input-key prompt --label-key label --rm-type final_answer \
      --sft-data "$2/answers.jsonl" --sft-steps $STEPS --num-rollout $STEPS \
      --rollout-batch-size 32 --n-samples-per-prompt 2 --rollout-max-response-len 56 --rollout-shuffle \
      --eval-interval $STEPS --eval-prompt-data heldout "$TASK/eval.jsonl" --eval-temperature 0 \
      --calculate-per-token-loss --lr 5e-4 --lr-warmup-iters 5 --lr-decay-style linear --adam-beta2 0.95
   python tools/convert_torch_dist_to_hf.py --input-dir "$2/checkpoints" --output-dir "$2/student" --force
}

report() {  # round, folder of the round
   python - "$1" "$2" <<'PYTHON'
import json
import pathlib
import sys

number, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
measured = [row["eval_accuracy"] for row in rows if row.get("eval_accuracy") is not None]
answers = sum(1 for _ in (folder / "answers.jsonl").open())
print(f"round {number}: {answers} answers kept, held-out accuracy {measured[0]:.1%} -> {measured[-1]:.1%}")
PYTHON
}

main "$@"; exit  # on one line: an edit of this file does not reach a run that has begun
