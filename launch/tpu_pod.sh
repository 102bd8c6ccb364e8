#!/bin/bash
# Trains on a slice of Cloud TPU: makes it, sets it up, runs the same command on
# all of its workers, follows the log of worker 0 and starts again after a
# preemption, a crash or a lost slice, until the command is done.
#
#   launch/tpu_pod.sh all --name=a --project=p --zone=us-central2-b \
#     --accelerator_type=v4-32 --runtime_version=tpu-ubuntu2204-base --spot \
#     --config=configs/cifar10.py --workdir=gs://bucket/run --delete \
#     -- --config.train.batch_size=4096
#
#   create  asks for the slice, and waits until it is there
#   setup   copies this checkout (or clones --repo) to the workers, installs it
#   run     starts the command where it does not run, and sees it to its end
#   all     create, setup, run; with --delete, delete at the end of any kind
#   logs    follows worker 0; status: of the slice and the command
#   stop    SIGTERM: the command saves and ends; delete: the slice with it
#
# Each --flag=value can be set as LAUNCH_FLAG; --dry-run prints the commands.
# Exits with 0 (done), 2 (bad input), 1 (gave up). docs/pods.md tells more.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
source launch/cluster.sh
source launch/tpu_slice.sh

readonly NAMES='name project zone accelerator_type runtime_version network
  subnetwork service_account repo ref config workdir python_version
  wait_timeout stop_timeout poll pause max_restarts max_crashes'
readonly SWITCHES='spot internal_ip delete'

set_defaults() {
  : "${LAUNCH_PYTHON_VERSION:=3.12}" # of the environment on the workers
  : "${LAUNCH_WAIT_TIMEOUT:=86400}"  # seconds in the queue
  : "${LAUNCH_STOP_TIMEOUT:=600}"    # seconds between the first end and SIGKILL
  : "${LAUNCH_POLL:=30}" "${LAUNCH_PAUSE:=30}"           # seconds
  : "${LAUNCH_MAX_RESTARTS:=100}" "${LAUNCH_MAX_CRASHES:=3}"
  local name
  for name in wait_timeout stop_timeout poll pause max_restarts max_crashes; do
    need_number "$name"
  done
}

need_slice() {
  need name "the slice's name"
  need project 'the Google Cloud project'
  need zone 'the zone'
}

need_request() {
  need_slice
  need accelerator_type "the slice's type, such as v4-32,"
  need runtime_version "the workers' software, such as tpu-ubuntu2204-base,"
}

need_command() {
  need config 'the config, such as configs/cifar10.py,'
  need workdir 'the work directory'
  [[ $LAUNCH_WORKDIR == gs://?* || $LAUNCH_WORKDIR == /* ]] ||
    die "--workdir=$LAUNCH_WORKDIR is not seen by every worker;" \
      'give gs://bucket/path, or /path on a shared file system'
}

copy_checkout() {
  local archive
  if [[ -n $dry_run ]]; then archive=checkout.tgz; else archive=$scratch.tgz; fi
  # shellcheck disable=SC2016  # for the inner shell to expand
  run bash -c 'set -o pipefail; git ls-files -z -co --exclude-standard |
    tar --null -T - -czf "$1"' _ "$archive" ||
    die 'this is no git checkout to copy; give --repo=URL to clone one'
  persistently tpu_vm scp "$archive" "$LAUNCH_NAME:fulllora_jax.tgz" \
    --worker=all &&
    persistently on_workers all "mkdir -p fulllora_jax && cd fulllora_jax &&
      rm -rf repo && mkdir repo && tar -xzf ../fulllora_jax.tgz -C repo"
}

clone_repo() {
  local clone
  clone="git clone -q $(quoted "$LAUNCH_REPO") repo"
  if [[ -n ${LAUNCH_REF:-} ]]; then
    clone+=" && git -C repo checkout -q $(quoted "$LAUNCH_REF")"
  fi
  persistently on_workers all "mkdir -p fulllora_jax && cd fulllora_jax &&
    rm -rf repo && $clone"
}

setup() {
  say "Setting up every worker of $LAUNCH_NAME ..."
  if [[ -n ${LAUNCH_REPO:-} ]]; then clone_repo; else copy_checkout; fi &&
    persistently worker all install "$LAUNCH_PYTHON_VERSION"
}

# The status of each worker, a line each; nothing if a worker gives none.
statuses() { worker all status 2>"$scratch" | sed -n 's/^status: //p'; }

all_running() {
  local found
  found=$(statuses) && [[ -n $found ]] && ! grep -qv '^running' <<<"$found"
}

# Makes the slice and sets it up; a slice lost on the way costs a restart.
bring_up() {
  until request_slice && wait_until_active && { all_running || setup; }; do
    slice_is_active && die "setup of $LAUNCH_NAME: $why"
    outcome=lost
    count_restart 'the slice was lost before it was set up'
    delete_slice
  done
}

start() {
  if [[ -z $dry_run ]]; then
    all_running && return
    persistently worker all stop "$LAUNCH_STOP_TIMEOUT" || return 0
  fi
  # A failure shows in the status, which sees_to_end asks for.
  persistently worker all start "--config=$LAUNCH_CONFIG" \
    "--workdir=$LAUNCH_WORKDIR" "${command_flags[@]}" || true
}

# Prints the log of worker 0 from the first line that was not seen, until the
# command ends there or the connection does.
follow() {
  if [[ -n $dry_run ]]; then
    worker 0 follow 1
    return
  fi
  local line
  while IFS= read -r line; do
    seen=$((seen + 1))
    echo "$line"
  done < <(worker 0 follow $((seen + 1)) 2>>"$scratch")
}

# Sets $outcome from the statuses, and $why to the one that decided: running,
# ending (still running on some workers), finished, bad_input, stopped, crashed.
judge() {
  if why=$(grep -m 1 "^$BAD_INPUT " <<<"$1"); then
    outcome=bad_input
  elif ! grep -qv '^running' <<<"$1"; then
    outcome=running
  elif grep -q '^running' <<<"$1"; then
    outcome=ending
  elif why=$(grep -m 1 -vE "^(0|$GOES_ON) " <<<"$1"); then
    outcome=crashed
  elif why=$(grep -m 1 -E "^$GOES_ON " <<<"$1"); then
    outcome=stopped
  else
    outcome=finished
  fi
}

# Follows the command until it has ended on every worker.
see_to_end() {
  local misses=0 found ended=
  while :; do
    follow
    if ! slice_is_active; then
      outcome=lost why="the slice is $slice_state"
      return
    fi
    found=$(statuses) || found=
    if [[ -z $found ]]; then
      outcome=lost why="no answer over ssh: $(reason "$scratch")"
      if ((++misses == 5)); then return; fi
      sleep "$LAUNCH_PAUSE"
      continue
    fi
    misses=0
    judge "$found"
    case $outcome in
      running) ended= ;;
      ending)
        : "${ended:=$SECONDS}"
        if ((SECONDS - ended >= LAUNCH_STOP_TIMEOUT)); then
          say 'warning: the command still runs on some workers; killing it'
          worker all stop 0 2>"$scratch" || true
        fi
        ;;
      *) return ;;
    esac
    sleep "$LAUNCH_POLL"
  done
}

# Counts a restart; gives up where there were too many.
count_restart() {
  restarts=$((restarts + 1))
  if [[ $outcome == crashed ]]; then
    crashes=$((crashes + 1))
  fi
  ((crashes <= LAUNCH_MAX_CRASHES)) ||
    give_up "crashed $crashes times, the last with $1;" \
      "see the log: launch/tpu_pod.sh logs; --max_crashes=$LAUNCH_MAX_CRASHES"
  ((restarts <= LAUNCH_MAX_RESTARTS)) ||
    give_up "not done after $LAUNCH_MAX_RESTARTS restarts (--max_restarts);" \
      "the last stop: $1"
  say "Stopped with: $1. Restart $restarts of at most $LAUNCH_MAX_RESTARTS" \
    "in $LAUNCH_PAUSE s ..."
  sleep "$LAUNCH_PAUSE"
}

run_until_done() {
  start
  while :; do
    see_to_end
    case $outcome in
      finished) break ;;
      bad_input)
        worker all stop "$LAUNCH_STOP_TIMEOUT" 2>"$scratch" || true
        die "the command refused its input: ${why#"$BAD_INPUT "}"
        ;;
    esac
    count_restart "$why"
    if [[ $outcome == lost ]]; then
      delete_slice
      bring_up
      seen=0
    fi
    start
  done
  say "Done. The report: $LAUNCH_WORKDIR/report.md"
}

dry_run_until_done() {
  start
  follow
  worker all status
  echo '# After a crash or SIGTERM: stop, start, follow and status again.'
  worker all stop "$LAUNCH_STOP_TIMEOUT"
  echo '# After a preemption: create, setup and run again, and before that:'
  delete_slice
}

finish() {
  local code=$?
  trap - EXIT
  exec 2>&3 # not where the command that was interrupted wrote
  if [[ $command == all && -n ${LAUNCH_DELETE:-} && -n $requested ]]; then
    (delete_slice) || say "warning: $LAUNCH_NAME may still cost money"
  fi
  rm -f "$scratch" "$scratch.tgz"
  exit "$code"
}

interrupted() {
  exec 2>&3
  say "Interrupted; the command goes on where it runs: launch/tpu_pod.sh run" \
    'follows it again, stop ends it, delete ends the slice.'
  LAUNCH_DELETE=
  exit 130
}

main() {
  case $command in
    create | setup | run | all | logs | status | stop | delete) ;;
    *) die "${command:-nothing}: unknown; known: create, setup, run, all," \
      'logs, status, stop, delete' ;;
  esac
  parse_flags "$NAMES" "$SWITCHES" "$@"
  set_defaults
  case $command in
    create) need_request ;;
    run | all) need_request && need_command ;;
    *) need_slice ;;
  esac
  need_program gcloud 'see https://cloud.google.com/sdk/docs/install'
  scratch=$(mktemp)
  exec 3>&2
  trap finish EXIT
  trap interrupted INT TERM HUP
  "do_$command"
}

do_create() {
  request_slice
  wait_until_active || give_up "$LAUNCH_NAME went away while it was awaited"
}

do_setup() { setup || die "setup of $LAUNCH_NAME: $why"; }

do_run() {
  if [[ -n $dry_run ]]; then dry_run_until_done; else run_until_done; fi
}

do_all() {
  if [[ -n $dry_run ]]; then
    request_slice
    wait_until_active
    setup
  else
    bring_up
  fi
  do_run
}

do_logs() { worker 0 follow 1; }

do_status() {
  run queued_resource describe
  worker all status
}

do_stop() { worker all stop "$LAUNCH_STOP_TIMEOUT"; }

do_delete() { delete_slice; }

command=${1:-} outcome='' why='' seen=0 restarts=0 crashes=0 requested=
[[ $# -eq 0 ]] || shift
main "$@"
