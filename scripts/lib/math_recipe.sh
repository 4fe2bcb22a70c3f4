# What the launch scripts for mathematics have in common: files, data, reward, estimator, optimizer. Source this file
# after BASE (models and data), RUN (results) and STUDENT (a folder in BASE) are set, and hand RECIPE_ARGS to train.py
# before a script's own flags: the last of two equal flags counts.
#
# EVAL_DATA=FILE   evaluate on it every 20 rollouts

CKPT_ARGS=(
   --hf-checkpoint "$BASE/$STUDENT"
   --ref-load "$BASE/${STUDENT}_torch_dist"
   --load "$RUN/checkpoints"
   --save "$RUN/checkpoints"
   --save-interval 20
)

ROLLOUT_ARGS=(
   --prompt-data "$BASE/dapo-math-17k/dapo-math-17k.jsonl"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --num-rollout 300
   --rollout-batch-size 16
   --n-samples-per-prompt 4
   --rollout-max-response-len 16384
   --rollout-temperature 1.0
   --global-batch-size 64
)

# The task reward is measured beside the teacher's scores, and judges the evaluation.
RM_ARGS=(
   --rm-type math
)

EVAL_ARGS=()
if [[ -n ${EVAL_DATA:-} ]]; then
   EVAL_ARGS=(
      --eval-interval 20
      --eval-prompt-data math500 "$EVAL_DATA"
      --n-samples-per-eval-prompt 1
      --eval-max-response-len 16384
   )
fi

# Activations are computed anew in the backward pass; a micro-batch holds as many tokens as the longest answer.
MEMORY_ARGS=(
   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 16384
   --use-distributed-optimizer
   --bf16
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --eps-clip 0.2
   --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1e-6
   --lr-decay-style constant
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.98
)

RECIPE_ARGS=(
   "${CKPT_ARGS[@]}"
   "${ROLLOUT_ARGS[@]}"
   "${RM_ARGS[@]}"
   "${EVAL_ARGS[@]}"
   "${MEMORY_ARGS[@]}"
   "${GRPO_ARGS[@]}"
   "${OPTIMIZER_ARGS[@]}"
   --output-dir "$RUN"
)
