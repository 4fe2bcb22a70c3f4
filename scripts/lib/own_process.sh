# What the other files here share about a process group that a script has started. They source this file.
#
#   stop_at_exit FUNCTION        calls it when the script ends, however that is; each function once
#   stop_group PID TENTHS        SIGTERM, and after so many tenths of a second SIGKILL, to the group that PID leads
#   show_failure TEXT LOG        an `error:` line and the end of the log, on stderr

[[ -v OWN_STOPS ]] || OWN_STOPS=()

stop_at_exit() {
   if [[ " ${OWN_STOPS[*]} " != *" $1 "* ]]; then
      OWN_STOPS+=("$1")
   fi
   trap _stop_own EXIT
   trap 'exit 130' INT
   trap 'exit 143' TERM
}

_stop_own() {
   local stop
   for stop in "${OWN_STOPS[@]}"; do
      "$stop"
   done
}

stop_group() {
   local pid=$1 tenths=$2 waited=0
   kill -TERM -- "-$pid" 2>/dev/null || kill -TERM "$pid" 2>/dev/null || true
   while kill -0 -- "-$pid" 2>/dev/null && ((waited < tenths)); do
      sleep 0.1
      waited=$((waited + 1))
   done
   kill -KILL -- "-$pid" 2>/dev/null || true
   { wait "$pid" || true; } 2>/dev/null
}

show_failure() {
   echo "error: $1." >&2
   if [[ -f $2 ]]; then
      echo "The end of its log, $2:" >&2
      tail -n 20 "$2" >&2
   fi
}
