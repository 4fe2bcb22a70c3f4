# A teacher of the laptop task that is no better than the student until it is told the answer, in $PRIVILEGED_TEACHER/hf.
# Source this file with TASK and ROOT (a folder for results) set, then call prepare_privileged_teacher.

PRIVILEGED_DATA=$ROOT/privileged-data
PRIVILEGED_TEACHER=$ROOT/privileged-teacher

# The student learns to use a hint and to slip without one: supervised steps of our own trainer, no teacher.
prepare_privileged_teacher() {
   if [ -f "$PRIVILEGED_TEACHER/hf/config.json" ]; then return; fi
   python "$TASK/make_privileged.py" --output-dir "$PRIVILEGED_DATA"
   python train.py \
      --hf-checkpoint "$TASK/student" --save "$PRIVILEGED_TEACHER/checkpoints" \
      --prompt-data "$TASK/train.jsonl" --input-key prompt --label-key label --rollout-shuffle --rm-type final_answer \
      --sft-data "$PRIVILEGED_DATA/warmup.jsonl" --sft-steps 200 --num-rollout 200 \
      --rollout-batch-size 32 --n-samples-per-prompt 2 --rollout-max-response-len 64 \
      --eval-interval 100 --eval-prompt-data plain "$TASK/eval.jsonl" hinted "$PRIVILEGED_DATA/eval-hinted.jsonl" \
         misled "$PRIVILEGED_DATA/eval-misled.jsonl" \
      --calculate-per-token-loss --lr 1e-3 --lr-warmup-iters 10 --lr-decay-style linear --adam-beta2 0.95 \
      --output-dir "$PRIVILEGED_TEACHER"
   python tools/convert_torch_dist_to_hf.py \
      --input-dir "$PRIVILEGED_TEACHER/checkpoints" --output-dir "$PRIVILEGED_TEACHER/hf"
}
