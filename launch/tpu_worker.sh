#!/bin/bash
# Runs on each worker of a TPU slice, where tpu_pod.sh calls it over ssh:
#
#   launch/tpu_worker.sh install PYTHON_VERSION
#   launch/tpu_worker.sh start --config=... --workdir=... [flags of main]
#   launch/tpu_worker.sh follow LINE   # the log from that line to its end
#   launch/tpu_worker.sh status        # `status: ...`, as below
#   launch/tpu_worker.sh stop SECONDS  # SIGTERM, and SIGKILL after that time
#
# The command runs apart from the ssh connection: a lost connection does not
# end it. Its environment, log and exit status lie beside the repository.
# The status is `running`, the exit status with the last line of the log, or
# what else there is to say: never started, or ended without an exit status.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
source launch/cluster.sh

home=$(cd .. && pwd)
readonly home python=$home/venv/bin/python
readonly log=$home/run.log status=$home/run.status pid_file=$home/run.pid

install() {
  # The images of the TPU machines carry an older Python; uv brings its own.
  python3 -m pip install -q --user --upgrade uv
  python3 -m uv venv -q --allow-existing --python="$1" "$home/venv"
  python3 -m uv pip install -q --python="$python" -e '.[tpu]'
}

# The process group of the run, while any of it lives (zombies do not).
group() {
  local pid
  pid=$(cat "$pid_file" 2>/dev/null) &&
    pgrep -g "$pid" --runstates D,R,S,T,t >/dev/null && echo "$pid"
}

start() {
  if group >/dev/null; then
    say 'the command runs already on this worker'
    return
  fi
  rm -f "$status"
  # shellcheck disable=SC2016  # for the inner shell to expand
  setsid bash -c 'trap : TERM; echo "$$" >"$1"; code=0
    # Beside it first, so that a reader never finds half of it.
    "${@:3}" || code=$?; echo "$code" >"$2.new"; mv "$2.new" "$2"' \
    _ "$pid_file" "$status" "$python" -m fulllora_jax.main "$@" \
    >>"$log" 2>&1 </dev/null &
  while ! [[ -e $status ]] && ! group >/dev/null; do sleep 0.05; done
}

follow() {
  local pid
  touch "$log"
  if pid=$(group); then
    tail -n "+$1" --pid="$pid" -f "$log"
  else
    tail -n "+$1" "$log"
  fi
}

# The last line of the log, or where JAX ended the command, what it said above
# the stack.
last_word() {
  if ! (($(<"$status") > 128)) ||
    ! grep -m 1 'JAX distributed service' < <(tail -n 100 "$log"); then
    reason "$log"
  fi
}

show_status() {
  if group >/dev/null; then
    echo 'status: running'
  elif [[ -e $status ]]; then
    echo "status: $(<"$status") $(last_word)"
  elif [[ -e $pid_file ]]; then
    echo 'status: no exit status: killed, or a new boot'
  else
    echo 'status: never started'
  fi
}

stop() {
  local pid tenths=$(($1 * 10))
  pid=$(group) || return 0
  # Not the shell that waits for it, which has to note the exit status.
  pkill -TERM -P "$pid" || true
  while ((tenths-- > 0)) && group >/dev/null; do sleep 0.1; done
  # It may take a moment to go, or, waiting for a disk, more than that.
  tenths=100
  while ((tenths-- > 0)) && group >/dev/null; do
    kill -KILL -- "-$pid" 2>/dev/null || true
    sleep 0.1
  done
}

case ${1:-} in
  install | start | follow | stop) "$@" ;;
  status) show_status ;;
  *)
    die "${1:-nothing}: unknown; known: install, start, follow, status, stop"
    ;;
esac
