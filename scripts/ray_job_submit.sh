#!/usr/bin/env bash
# Hands a run to a Ray cluster as a job, and shows its output until it ends; the run goes on when this script is stopped.
#
#   RAY_JOBS=http://HEAD:8265 bash scripts/ray_job_submit.sh python train.py FLAGS ...
#   RAY_JOBS=http://HEAD:8265 bash scripts/ray_job_submit.sh bash examples/on_policy_distillation/run-qwen3-8B-opd-megatron.sh
#
# The cluster's head needs the job server: `pip install "ray[default]"`, and `ray start --head --include-dashboard=true`.
# The command runs on the head, in this folder, which all machines must see under the same path. Ray sets RAY_ADDRESS
# for it, so train.py places its ranks on that cluster. `ray job stop ID` sends SIGTERM, upon which a run saves; give it
# time for that with RAY_JOB_STOP_WAIT_TIME_S=600 in the environment of `ray start --head` (3 s without it).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if (($# == 0)); then
   echo "error: ray_job_submit.sh: no command. Give what the job shall run, such as python train.py FLAGS." >&2
   exit 2
fi
if [[ -z ${RAY_JOBS:-} ]]; then
   echo "error: ray_job_submit.sh: RAY_JOBS is not set. Give the job server's address, such as http://10.0.0.1:8265." >&2
   exit 2
fi
printf -v COMMAND '%q ' "$@"
exec ray job submit --address "$RAY_JOBS" -- bash -c "cd $(printf '%q' "$ROOT") && exec $COMMAND"
