# Flags of the laptop task that both tiny scripts share. Source this file with TASK and OUTPUT_DIR set.

CKPT_ARGS=(
   --hf-checkpoint "$TASK/student"
   --save "$OUTPUT_DIR/checkpoints"
   --save-interval 10
   ${RESUME:+--load "$OUTPUT_DIR/checkpoints"}
)
ROLLOUT_ARGS=(
   --prompt-data "$TASK/train.jsonl"
   --input-key prompt
   --label-key label
   --rollout-shuffle
   --rm-type final_answer
   --num-rollout 40
   --rollout-batch-size 16
   --n-samples-per-prompt 8
   --rollout-max-response-len 56
   --rollout-temperature 1.0
)
EVAL_ARGS=(
   --eval-interval 10
   --eval-prompt-data heldout "$TASK/eval.jsonl"
   --eval-temperature 0
)
GRPO_ARGS=(
   --advantage-estimator grpo
   --calculate-per-token-loss
   --eps-clip 0.2
)
OPTIMIZER_ARGS=(
   --lr 2e-4
   --lr-warmup-iters 3
   --adam-beta2 0.95
)

TINY_ARGS=("${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}")
