#!/bin/bash
# Trains on TPU slices of a GKE cluster: fills in launch/gke_jobset.yaml,
# applies it, follows the log of the first pod and says how it ended.
#
#   launch/gke_apply.sh all --name=a --image=us-docker.pkg.dev/p/r/i \
#     --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --chips=4 \
#     --config=configs/cifar10.py --workdir=gs://bucket/run \
#     -- --config.train.batch_size=4096
#
#   apply   makes the JobSet; render: prints it
#   follow  the log of the first pod to the end of the JobSet, over restarts
#   all     apply and follow; with --delete, delete at the end of any kind
#   status  of the JobSet and its pods; delete: the pods save and go
#
# Each --flag=value can be set as LAUNCH_FLAG; --dry-run prints the commands.
# Exits with 0 (done), 2 (bad input), 1 (gave up). docs/pods.md tells more.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
source launch/cluster.sh

readonly NAMES='name image accelerator topology hosts chips slices context
  namespace service_account config workdir grace max_restarts wait_timeout poll'
readonly SWITCHES='spot delete'
readonly TEMPLATE=launch/gke_jobset.yaml

set_defaults() {
  : "${LAUNCH_NAMESPACE:=default}" "${LAUNCH_SERVICE_ACCOUNT:=default}"
  : "${LAUNCH_SLICES:=1}"
  : "${LAUNCH_GRACE:=300}"           # seconds from SIGTERM to SIGKILL
  : "${LAUNCH_MAX_RESTARTS:=3}"      # of crashes alone
  : "${LAUNCH_WAIT_TIMEOUT:=86400}"  # seconds without any pod that runs
  : "${LAUNCH_POLL:=30}"             # seconds
  local name
  for name in slices grace max_restarts wait_timeout poll; do
    need_number "$name"
  done
}

need_job() {
  need name "the JobSet's name"
  # The pods' names, NAME-slice-JOB-INDEX, are labels of DNS: 63 characters.
  [[ $LAUNCH_NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "--name=$LAUNCH_NAME: at most 40 of a-z, 0-9 and -," \
      'a letter first and no - last'
}

need_manifest() {
  local name
  need image 'the image of the container'
  need accelerator "the nodes' TPU, such as tpu-v5-lite-podslice,"
  need topology "the slice's topology, such as 4x4,"
  need hosts 'the number of hosts of a slice'
  need chips 'the number of chips of a host'
  need config 'the config, such as configs/cifar10.py,'
  need workdir 'the work directory'
  for name in hosts chips; do need_number "$name"; done
  [[ $LAUNCH_WORKDIR == gs://?* ]] ||
    die "--workdir=$LAUNCH_WORKDIR is not seen by every pod;" \
      'give gs://bucket/path'
}

# Prints the words as a list of JSON, one word as a string of it.
json_string() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  echo "\"${text//$'\t'/\\t}\""
}

json_list() {
  local word text=
  for word in "$@"; do
    # Kubernetes takes $(WORD) for one of its variables.
    text+=", $(json_string "${word//\$(/\$\$(}")"
  done
  echo "[${text#, }]"
}

value_of() {
  local variable=LAUNCH_${1^^}
  case $1 in
    arguments)
      json_list "--config=$LAUNCH_CONFIG" "--workdir=$LAUNCH_WORKDIR" \
        "${command_flags[@]}" ;;
    coordinator) json_string "$LAUNCH_NAME-slice-0-0.$LAUNCH_NAME:8482" ;;
    processes) json_string "$((LAUNCH_SLICES * LAUNCH_HOSTS))" ;;
    hosts_text) json_string "$LAUNCH_HOSTS" ;;
    slices | hosts | chips | grace | max_restarts) echo "${!variable}" ;;
    name | namespace | service_account | accelerator | topology | image)
      json_string "${!variable}" ;;
    *) die "$TEMPLATE: {{$1}} is unknown" ;;
  esac
}

# Prints the manifest. Values are not looked at for further {{...}}.
render() {
  local line value
  while IFS= read -r line || [[ -n $line ]]; do
    if [[ $line =~ ^[[:space:]]*# ]]; then continue; fi
    if [[ $line == *' # with --spot' && -z ${LAUNCH_SPOT:-} ]]; then
      continue
    fi
    if [[ $line =~ ^([^{]*)\{\{([a-z_]+)\}\}([^{}]*)$ ]]; then
      local before=${BASH_REMATCH[1]} after=${BASH_REMATCH[3]}
      value=$(value_of "${BASH_REMATCH[2]}") || exit
      line=$before$value$after
    elif [[ $line == *'{{'* || $line == *'}}'* ]]; then
      die "$TEMPLATE: not one placeholder alone: $line"
    fi
    printf '%s\n' "$line"
  done <"$TEMPLATE"
}

cluster() {
  local context=()
  if [[ -n ${LAUNCH_CONTEXT:-} ]]; then
    context=("--context=$LAUNCH_CONTEXT")
  fi
  run kubectl "${context[@]}" "--namespace=$LAUNCH_NAMESPACE" "$@"
}

# Stops with kubectl's reason and what to change.
refused() {
  local why remedy
  why=$(reason "$scratch")
  case $why in
    *'no matches for kind'*)
      remedy='install JobSet 0.10 or newer in the cluster' ;;
    *'unknown field'*) remedy='bring JobSet in the cluster to 0.10 or newer' ;;
    *orbidden*) remedy='ask for the rights in --namespace, or change it' ;;
    *'was refused'* | *'Unable to connect'* | *'no context'* | *context*exist*)
      remedy='gcloud container clusters get-credentials, or --context' ;;
    *immutable*) remedy='change --name, or delete it first' ;;
    *[Nn]'ot found'* | *NotFound*) remedy='check --name and --namespace' ;;
    *) remedy='kubectl gives this reason alone' ;;
  esac
  die "$why; $LAUNCH_NAME in namespace $LAUNCH_NAMESPACE: $remedy"
}

do_render() { render; }

do_apply() {
  local manifest
  manifest=$(render) || exit
  if [[ -n $dry_run ]]; then
    echo "$(cluster apply -f -) <<'END'"
    printf '%s\nEND\n' "$manifest"
  else
    cluster apply -f - <<<"$manifest" 2>"$scratch" || refused
  fi
}

# Sets $end to Completed, Failed or nothing, from what the JobSet says.
ask_end() {
  local left=5
  until end=$(cluster get jobset "$LAUNCH_NAME" \
    '--output=jsonpath={.status.terminalState}' 2>"$scratch"); do
    if ((--left == 0)) || grep -q 'NotFound' "$scratch"; then refused; fi
    sleep "$LAUNCH_POLL"
  done
}

# The log of the first pod of the first slice. It ends with the pod.
first_log() {
  local labels=jobset.sigs.k8s.io/jobset-name=$LAUNCH_NAME
  labels+=,jobset.sigs.k8s.io/job-index=0
  labels+=,batch.kubernetes.io/job-completion-index=0
  # More than one pod for a moment, when one goes and the next one comes.
  cluster logs "--selector=$labels" --container=main --follow --tail=-1 "$@"
}

do_follow() {
  if [[ -n $dry_run ]]; then
    first_log
    echo "# ... for each new pod, every $LAUNCH_POLL s, until the JobSet ended:"
    cluster get jobset "$LAUNCH_NAME" \
      '--output=jsonpath={.status.terminalState}'
    return
  fi
  local since=() heard=$SECONDS spoke=
  while ask_end && [[ -z $end ]]; do
    # No line twice, as far as whole seconds tell.
    if [[ -n $spoke ]]; then since=("--since=$((SECONDS - heard + 1))s"); fi
    # Without any pod, kubectl says so and is content.
    if first_log "${since[@]}" 2>"$scratch" &&
      ! grep -q '^No resources' "$scratch"; then
      heard=$SECONDS spoke=1
    elif ((SECONDS - heard >= LAUNCH_WAIT_TIMEOUT)); then
      give_up "no pod of $LAUNCH_NAME ran for $LAUNCH_WAIT_TIMEOUT s" \
        "(--wait_timeout), see launch/gke_apply.sh status: $(reason "$scratch")"
    else
      say "Waiting for the first pod of $LAUNCH_NAME: $(reason "$scratch")"
    fi
    sleep "$LAUNCH_POLL"
  done
  report_end
}

report_end() {
  local why failed='.status.conditions[?(@.type=="Failed")]'
  if [[ $end == Completed ]]; then
    say "Done. The report: ${LAUNCH_WORKDIR:-the work directory}/report.md"
    return
  fi
  why=$(cluster get jobset "$LAUNCH_NAME" \
    "--output=jsonpath={$failed.reason}: {$failed.message}" 2>"$scratch") ||
    refused
  # Of the rules of the template, the one for bad input alone fails the JobSet.
  if [[ $why == FailJobSetFailurePolicyAction:* ]]; then
    die 'the command refused its input; its line is in the log of a pod:' \
      'launch/gke_apply.sh status names them'
  fi
  give_up "the JobSet failed (--max_restarts=$LAUNCH_MAX_RESTARTS): $why"
}

do_all() {
  do_apply
  applied=1
  do_follow
}

do_status() {
  cluster get jobset "$LAUNCH_NAME" 2>"$scratch" || refused
  cluster get pods --output=wide \
    "--selector=jobset.sigs.k8s.io/jobset-name=$LAUNCH_NAME"
}

do_delete() {
  cluster delete jobset "$LAUNCH_NAME" --ignore-not-found \
    2>"$scratch" || refused
}

finish() {
  local code=$?
  trap - EXIT
  exec 2>&3 # not where the command that was interrupted wrote
  if [[ $command == all && -n ${LAUNCH_DELETE:-} && -n $applied ]]; then
    (do_delete) || say "warning: $LAUNCH_NAME may still hold its nodes"
  fi
  rm -f "$scratch"
  exit "$code"
}

interrupted() {
  exec 2>&3
  say 'Interrupted; the JobSet goes on: launch/gke_apply.sh follow, or delete.'
  LAUNCH_DELETE=
  exit 130
}

main() {
  case $command in
    apply | render | follow | all | status | delete) ;;
    *) die "${command:-nothing}: unknown; known: apply, render, follow, all," \
      'status, delete' ;;
  esac
  parse_flags "$NAMES" "$SWITCHES" "$@"
  set_defaults
  need_job
  case $command in apply | render | all) need_manifest ;; esac
  if [[ $command != render ]]; then
    need_program kubectl 'gcloud components install kubectl'
  fi
  scratch=$(mktemp)
  exec 3>&2
  trap finish EXIT
  trap interrupted INT TERM HUP
  "do_$command"
}

command=${1:-} end='' applied=''
[[ $# -eq 0 ]] || shift
main "$@"
