# What the scripts of this folder share: answers from the tiny pair, and supervised steps of the student on them.
# Source this file with TASK and STEPS set.

# The teacher reads the answer, the student does not.
generate() {  # teacher, student, file to write, more flags
   python tools/generate_mixture_data.py \
      --input "$TASK/train.jsonl" --input-key prompt --label-key label --limit 640 \
      --teacher "$1" --theta "$2" \
      --teacher-template "Answer: {label}. {prompt}" --theta-template "{prompt}" \
      --max-tokens 56 --output "$3" "${@:4}"
}

# Supervised steps on the answers' tokens, and the trained weights as a Hugging Face folder.
train() {  # student, file with answers, folder, more flags
   rm -rf "$3/checkpoints" "$3/run"
   python train.py \
      --hf-checkpoint "$1" --save "$3/checkpoints" --output-dir "$3/run" \
      --prompt-data "$TASK/train.jsonl" --input-key prompt --label-key label --rm-type final_answer \
      --sft-data "$2" --sft-steps $STEPS --num-rollout $STEPS \
      --rollout-batch-size 32 --n-samples-per-prompt 2 --rollout-max-response-len 56 --rollout-shuffle \
      --eval-interval $STEPS --eval-prompt-data heldout "$TASK/eval.jsonl" --eval-temperature 0 \
      --calculate-per-token-loss --lr 5e-4 --lr-warmup-iters 5 --lr-decay-style linear --adam-beta2 0.95 "${@:4}"
   python tools/convert_torch_dist_to_hf.py --input-dir "$3/checkpoints" --output-dir "$3/student" --force
}

# Held-out accuracy before and after, as percentages.
accuracies() {  # folder of a training run
   python - "$1" <<'PYTHON'
import json
import pathlib
import sys

rows = [json.loads(line) for line in (pathlib.Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()]
measured = [row["eval_accuracy"] for row in rows if row.get("eval_accuracy") is not None]
print(f"{measured[0]:.1%} -> {measured[-1]:.1%}")
PYTHON
}
