# Sourced by tpu_pod.sh: the queued resource, its slice, and ssh to its workers.
# Flags have been read; $scratch is a file for what gcloud says on stderr.
# shellcheck shell=bash disable=SC2034,SC2154

# queued_resource VERB FLAG...
queued_resource() {
  run gcloud compute tpus queued-resources "$1" "$LAUNCH_NAME" \
    "--project=$LAUNCH_PROJECT" "--zone=$LAUNCH_ZONE" --quiet "${@:2}"
}

# tpu_vm VERB ARGUMENT...
tpu_vm() {
  local address=()
  if [[ -n ${LAUNCH_INTERNAL_IP:-} ]]; then address=(--internal-ip); fi
  run gcloud compute tpus tpu-vm "$@" "--project=$LAUNCH_PROJECT" \
    "--zone=$LAUNCH_ZONE" --quiet "${address[@]}"
}

# on_workers WORKERS COMMAND: in a shell of each of the workers.
on_workers() {
  # Without the two, a connection to a preempted worker may never end.
  tpu_vm ssh "$LAUNCH_NAME" "--worker=$1" "--command=$2" \
    --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=8
}

# worker WORKERS ARGUMENT...: launch/tpu_worker.sh there.
worker() {
  on_workers "$1" "fulllora_jax/repo/launch/tpu_worker.sh $(quoted "${@:2}")"
}

# Up to five times, with a pause; $why is left with the last reason.
persistently() {
  local left=5
  until "$@" 2>"$scratch"; do
    why=$(reason "$scratch")
    ((--left)) || return 1
    say "Trying again in $LAUNCH_PAUSE s: $why"
    sleep "$LAUNCH_PAUSE"
  done
}

# The same, but stops at once where gcloud has a reason to refuse.
insist() {
  local left=5 why
  until "$@" 2>"$scratch"; do
    why=$(reason "$scratch")
    if remedy "$why" >/dev/null || ((--left == 0)); then refused "$why"; fi
    say "Trying again in $LAUNCH_PAUSE s: $why"
    sleep "$LAUNCH_PAUSE"
  done
}

# Prints what to change, for the reasons of gcloud that are not chance.
remedy() {
  local quota='ask for more quota, or try --spot, whose quota is its own,'
  case $1 in
    *'active account'* | *eauthenticat* | *UNAUTHENTICATED*)
      echo 'log in: gcloud auth login' ;;
    *SERVICE_DISABLED* | *'has not been used in project'*)
      echo 'turn it on: gcloud services enable tpu.googleapis.com' ;;
    *PERMISSION_DENIED* | *'does not have permission'*)
      echo 'grant the account roles/tpu.admin (and the use of' \
        '--service_account), or change --project' ;;
    *RESOURCE_EXHAUSTED* | *[Qq]uota*) echo "$quota or change --zone" ;;
    *ALREADY_EXISTS*) echo 'change --name, or delete it first' ;;
    *untime*ersion*)
      echo 'change --runtime_version: gcloud compute tpus versions list' \
        "--zone=$LAUNCH_ZONE" ;;
    *NOT_FOUND* | *INVALID_ARGUMENT* | *ccelerator*)
      echo 'change --accelerator_type or --zone: gcloud compute tpus' \
        "accelerator-types list --zone=$LAUNCH_ZONE" ;;
    *) return 1 ;;
  esac
}

# Prints the state of the queued resource, or NONE; insist fills $scratch.
describe_state() {
  queued_resource describe '--format=value(state.state)' || {
    grep -q NOT_FOUND "$scratch" && echo NONE
  }
}

ask_slice_state() { slice_state=$(insist describe_state) || exit; }

slice_is_active() {
  ask_slice_state
  [[ $slice_state == ACTIVE ]]
}

# Stops with gcloud's reason and what to change.
refused() {
  die "$1; ${LAUNCH_NAME} in $LAUNCH_ZONE: $(remedy "$1" ||
    echo 'gcloud gives this reason alone')"
}

# Asks for the slice, unless it is there or in the queue.
request_slice() {
  if [[ -z $dry_run ]]; then
    ask_slice_state
    case $slice_state in
      NONE) ;;
      FAILED | SUSPENDING | SUSPENDED) delete_slice ;;
      *)
        say "$LAUNCH_NAME is $slice_state already"
        requested=1
        return
        ;;
    esac
  fi
  local optional=() name
  for name in network subnetwork service_account; do
    local variable=LAUNCH_${name^^}
    if [[ -n ${!variable:-} ]]; then
      optional+=("--${name//_/-}=${!variable}")
    fi
  done
  if [[ -n ${LAUNCH_INTERNAL_IP:-} ]]; then optional+=(--internal-ips); fi
  if [[ -n ${LAUNCH_SPOT:-} ]]; then optional+=(--spot); fi
  insist queued_resource create "--node-id=$LAUNCH_NAME" \
    "--accelerator-type=$LAUNCH_ACCELERATOR_TYPE" \
    "--runtime-version=$LAUNCH_RUNTIME_VERSION" "${optional[@]}"
  requested=1
}

why_it_failed() {
  queued_resource describe '--format=value(state.failedData.error.message)'
}

# Fails where the slice goes away again before it can be used.
wait_until_active() {
  if [[ -n $dry_run ]]; then
    queued_resource describe '--format=value(state.state)'
    echo "# ... every $LAUNCH_POLL s until ACTIVE"
    return
  fi
  local began=$SECONDS
  until slice_is_active; do
    case $slice_state in
      FAILED) refused "$(why_it_failed 2>"$scratch" || reason "$scratch")" ;;
      NONE | SUSPENDING | SUSPENDED) return 1 ;;
    esac
    ((SECONDS - began < LAUNCH_WAIT_TIMEOUT)) ||
      give_up "$LAUNCH_NAME is still $slice_state after" \
        "$LAUNCH_WAIT_TIMEOUT s; raise --wait_timeout, change --zone, or" \
        'take it out of the queue: launch/tpu_pod.sh delete'
    say "$LAUNCH_NAME: $slice_state for $((SECONDS - began)) s, of at most" \
      "$LAUNCH_WAIT_TIMEOUT s ..."
    sleep "$LAUNCH_POLL"
  done
}

delete_or_gone() {
  queued_resource delete --force || grep -q NOT_FOUND "$scratch"
}

delete_slice() {
  insist delete_or_gone
  requested=
}
