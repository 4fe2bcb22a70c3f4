# A Ray cluster for launch scripts: start this machine's node, wait for the others, stop what was started. Source this file.
#
#   start_ray_head ADDRESS PORT LOG [ray start flags ...]        the cluster's head, on this machine at ADDRESS
#   start_ray_worker ADDRESS HEAD:PORT LOG [ray start flags ...] a further machine of the cluster, at ADDRESS
#   wait_for_ray HEAD:PORT NODES SECONDS                         until the cluster has that many nodes
#   stop_ray                                                     stops the node that this script started, and no other
#
# Ray lets in whoever knows the token in ~/.ray/auth_token, which the head makes: give every machine that file, or the same
# RAY_AUTH_TOKEN (RAY_AUTH_MODE=disabled does without).
# ADDRESS is that of the network between the machines; on one machine alone 127.0.0.1. Devices are found by Ray; on a
# machine without a GPU give `--num-cpus N`, one for each training rank and each SGLang engine.

source "$(dirname "${BASH_SOURCE[0]}")/own_process.sh"

RAY_NODE_PID=""
RAY_NODE_LOG=""
RAY_LIB_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

start_ray_head() {
   local address=$1 port=$2 log=$3
   shift 3
   if [[ ${RAY_AUTH_MODE:-token} == token ]]; then
      "${PYTHON:-python}" -m ray.scripts.scripts get-auth-token --generate >/dev/null || return 1  # keeps one that is there
   fi
   _start_ray "$address" "$log" --head --port "$port" --include-dashboard=false "$@"
}

start_ray_worker() {
   local address=$1 head=$2 log=$3
   shift 3
   _start_ray "$address" "$log" --address "$head" "$@"
}

wait_for_ray() {
   local address=$1 nodes=$2 seconds=$3 end found=""
   end=$((SECONDS + seconds))
   while ((SECONDS < end)); do
      if [[ -n $RAY_NODE_PID ]] && ! kill -0 "$RAY_NODE_PID" 2>/dev/null; then
         show_failure "the Ray node of this machine ended" "$RAY_NODE_LOG"
         return 1
      fi
      found=$("${PYTHON:-python}" "$RAY_LIB_ROOT/scripts/lib/ray_nodes.py" "$address" 2>/dev/null) || found=""
      if ((${found:-0} >= nodes)); then
         return 0
      fi
      sleep 1
   done
   show_failure "the Ray cluster at $address has ${found:-no} of $nodes nodes after $seconds s" "$RAY_NODE_LOG"
   return 1
}

_start_ray() {
   local address=$1 log=$2 owner=$BASHPID  # in the background BASHPID is another one
   shift 2
   if [[ -n $RAY_NODE_PID ]]; then
      echo "error: start_ray: the Ray node with pid $RAY_NODE_PID is still running. Stop it first." >&2
      return 1
   fi
   mkdir -p "$(dirname "$log")"
   RAY_NODE_LOG=$log
   local settings=(RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" PYTHONPATH="$RAY_LIB_ROOT${PYTHONPATH:+:$PYTHONPATH}")
   if [[ $address == 127.* ]]; then
      settings+=(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0)  # Ray's switch for "127.0.0.1 is my address"
   fi
   # Its own session, so that stopping the group reaches all of Ray's processes and nothing else; and a guard that ends
   # the group when this script is gone, however it went.
   env "${settings[@]}" \
      setsid "${PYTHON:-python}" -m opd.serving.with_parent "$owner" \
      "${PYTHON:-python}" -m ray.scripts.scripts start --block --disable-usage-stats --node-ip-address "$address" \
      --object-store-memory "${RAY_OBJECT_STORE_BYTES:-200000000}" "$@" >"$log" 2>&1 &
   RAY_NODE_PID=$!
   stop_at_exit stop_ray
}

stop_ray() {
   local pid=$RAY_NODE_PID
   RAY_NODE_PID=""
   [[ -n $pid ]] || return 0
   # Ray gives its workers up to 30 s; a run has ended by itself before its nodes are stopped.
   stop_group "$pid" 20
}
