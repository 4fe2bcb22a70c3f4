# Supervised steps of the laptop task's student, by our own trainer and without a teacher. Source this file with TASK set.
#
#   warm_up ANSWERS STEPS CHECKPOINTS RUN MODEL EVAL ...   on the rows of ANSWERS; the trained model as a Hugging Face
#                                                          folder in MODEL. EVAL: name and file of each evaluation

warm_up() {
   python train.py \
      --hf-checkpoint "$TASK/student" --save "$3" \
      --prompt-data "$TASK/train.jsonl" --input-key prompt --label-key label --rollout-shuffle --rm-type final_answer \
      --sft-data "$1" --sft-steps "$2" --num-rollout "$2" \
      --rollout-batch-size 32 --n-samples-per-prompt 2 --rollout-max-response-len 64 \
      --eval-interval 100 --eval-prompt-data "${@:6}" \
      --calculate-per-token-loss --lr 1e-3 --lr-warmup-iters 10 --lr-decay-style linear --adam-beta2 0.95 \
      --output-dir "$4"
   python tools/convert_torch_dist_to_hf.py --input-dir "$3" --output-dir "$5"
}
