# A teacher of the laptop task that is no better than the student until it is told the answer, in $PRIVILEGED_TEACHER/hf.
# Source this file with TASK and ROOT (a folder for results) set, then call prepare_privileged_teacher.

source "$TASK/warm_up.sh"

PRIVILEGED_DATA=$ROOT/privileged-data
PRIVILEGED_TEACHER=$ROOT/privileged-teacher

# The student learns to use a hint and to slip without one: supervised steps of our own trainer, no teacher.
prepare_privileged_teacher() {
   if [ -f "$PRIVILEGED_TEACHER/hf/config.json" ]; then return; fi
   python "$TASK/make_privileged.py" --output-dir "$PRIVILEGED_DATA"
   warm_up "$PRIVILEGED_DATA/warmup.jsonl" 200 "$PRIVILEGED_TEACHER/checkpoints" "$PRIVILEGED_TEACHER" \
      "$PRIVILEGED_TEACHER/hf" plain "$TASK/eval.jsonl" hinted "$PRIVILEGED_DATA/eval-hinted.jsonl" \
      misled "$PRIVILEGED_DATA/eval-misled.jsonl"
}
