# What the experiments share. Source this file from the repository's root.
#
#   run_method METHOD SEED FOLDER STEPS FLAGS ...   one run of compare-objectives.sh's METHOD into FOLDER, its accuracy
#                                                   measured every 5 steps; skipped where it is complete
#   best_rate METHOD                                its tuned learning rate
#
# SEEDS         seeds of an experiment (42 43 44)
# RUN_STEPS     steps of a run (40)
# EXPERIMENTS   folder of all results (outputs/experiments)

SEEDS=${SEEDS:-42 43 44}
RUN_STEPS=${RUN_STEPS:-40}
EXPERIMENTS=${EXPERIMENTS:-outputs/experiments}
TASK=examples/on_policy_distillation/tiny_task
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

run_method() {
   local method=$1 seed=$2 folder=$3 steps=$4
   shift 4
   OUTPUT_DIR=$folder STEPS=$steps bash examples/on_policy_distillation/compare-objectives.sh "$method" "$seed" \
      --save-interval 20 --eval-interval 5 --eval-prompt-data heldout "$TASK/eval.jsonl" "$@"
}

best_rate() {
   awk -v method="$1" '$1 == method { print $2 }' examples/experiments/best_rates.txt
}
