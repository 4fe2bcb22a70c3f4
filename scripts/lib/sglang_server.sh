# An SGLang server as a teacher, for launch scripts: start, wait until it answers, stop. Source this file.
#
#   start_sglang_server MODEL PORT LOG [SGLang flags ...]   sets SGLANG_SERVER_PID and stops the server when the script ends
#   wait_for_server URL SECONDS                             until URL/health answers; fails when the server died or time is up
#   stop_sglang_server                                      stops the server that start_sglang_server started, and no other
#
# Without a CUDA device the server runs on the CPU, with the flags this needs.

source "$(dirname "${BASH_SOURCE[0]}")/own_process.sh"

SGLANG_SERVER_PID=""
SGLANG_SERVER_LOG=""
SGLANG_LIB_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

start_sglang_server() {
   local model=$1 port=$2 log=$3
   shift 3
   # --parent-pid comes first: the server then ends with this script even when that is killed outright.
   local flags=(--parent-pid "$BASHPID" --model-path "$model" --host "${SGLANG_HOST:-127.0.0.1}" --port "$port")
   local environment=(PYTHONPATH="$SGLANG_LIB_ROOT${PYTHONPATH:+:$PYTHONPATH}")
   if ! command -v nvidia-smi >/dev/null 2>&1; then
      flags+=(--device cpu --attention-backend torch_native --sampling-backend pytorch --disable-cuda-graph)
      flags+=(--disable-overlap-schedule --sleep-on-idle --dtype float32 --skip-server-warmup --max-total-tokens "${SGLANG_MAX_TOTAL_TOKENS:-65536}")
      environment+=(SGLANG_USE_CPU_ENGINE=1)
   fi
   if [[ -n $SGLANG_SERVER_PID ]]; then
      echo "error: start_sglang_server: the server with pid $SGLANG_SERVER_PID is still running. Stop it first." >&2
      return 1
   fi
   wait_for_free_port "$port" 10
   mkdir -p "$(dirname "$log")"
   SGLANG_SERVER_LOG=$log
   # Its own session, so that stopping the group reaches SGLang's workers and nothing else.
   env "${environment[@]}" setsid "${PYTHON:-python}" -m opd.serving.sglang_cpu "${flags[@]}" "$@" >"$log" 2>&1 &
   SGLANG_SERVER_PID=$!
   stop_at_exit stop_sglang_server
}

# A server that answers there already would be taken for the one that is started. One that is ending is waited for.
wait_for_free_port() {
   local port=$1 end=$((SECONDS + $2))
   while (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
      if ((SECONDS >= end)); then
         echo "error: start_sglang_server: port $port is in use. End the program that listens there, or give another port." >&2
         return 1
      fi
      sleep 1
   done
}

wait_for_server() {
   local url=${1%/} seconds=$2 end
   end=$((SECONDS + seconds))
   while ((SECONDS < end)); do
      if [[ -n $SGLANG_SERVER_PID ]] && ! kill -0 "$SGLANG_SERVER_PID" 2>/dev/null; then
         show_failure "the server of $url ended" "$SGLANG_SERVER_LOG"
         return 1
      fi
      if "${PYTHON:-python}" -c 'import sys, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=2)' "$url/health" 2>/dev/null; then
         return 0
      fi
      sleep 1
   done
   show_failure "no answer from $url/health within $seconds s" "$SGLANG_SERVER_LOG"
   return 1
}

stop_sglang_server() {
   local pid=$SGLANG_SERVER_PID
   SGLANG_SERVER_PID=""
   [[ -n $pid ]] || return 0
   # SGLang spends 5 s on diagnostics after a SIGTERM; it holds nothing that a SIGKILL could damage.
   stop_group "$pid" 15
}
