# How a launch script starts train.py, and the teacher's server before it. Source this file.
#
#   start_training GPUS FLAGS ...          on this machine, one process per GPU (torchrun)
#   submit_training FLAGS ...              on a Ray cluster that runs already, as a job of it
#   serve_teacher MODEL GPUS [FLAGS ...]   an SGLang server on these devices of this machine, stopped with the script;
#                                          sets TEACHER_URL, and starts nothing where that names a server already
#
# DRY_RUN=1   print the plan, memory per rank included, and start nothing: needs neither GPU, weights nor cluster
# PYTHON      the interpreter
# RAY_JOBS    address of the cluster's job server (default http://127.0.0.1:8265); scripts/ray_job_submit.sh has its needs
source "$(dirname "${BASH_SOURCE[0]}")/sglang_server.sh"

start_training() {
   local gpus=$1 launch=("${PYTHON:-python}")
   shift
   if [[ -n ${DRY_RUN:-} ]]; then
      "${launch[@]}" train.py "$@" --dry-run
      return
   fi
   ((gpus == 1)) || launch+=(-m torch.distributed.run --nproc-per-node "$gpus")
   "${launch[@]}" train.py "$@"
}

submit_training() {
   if [[ -n ${DRY_RUN:-} ]]; then
      "${PYTHON:-python}" train.py "$@" --dry-run
      return
   fi
   RAY_JOBS=${RAY_JOBS:-http://127.0.0.1:8265} bash scripts/ray_job_submit.sh "${PYTHON:-python}" train.py "$@"
}

serve_teacher() {
   local model=$1 gpus=$2
   shift 2
   [[ -z ${TEACHER_URL:-} ]] || return 0
   local port=${TEACHER_PORT:-13141}
   TEACHER_URL=http://127.0.0.1:$port
   [[ -z ${DRY_RUN:-} ]] || return 0
   SGLANG_HOST=127.0.0.1 CUDA_VISIBLE_DEVICES=$gpus start_sglang_server "$model" "$port" "$RUN/teacher.log" "$@"
   wait_for_server "$TEACHER_URL" "${TEACHER_SECONDS:-900}"
}
