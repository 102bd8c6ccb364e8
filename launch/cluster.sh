# Sourced by tpu_pod.sh, gke_apply.sh and slurm.sbatch, at the root of the
# repository: flags, dry runs, and the exit codes of fulllora_jax.main.
# shellcheck shell=bash disable=SC2034
source launch/environment.sh

# The exit codes of fulllora_jax.main that are not 0 and not a crash. As a
# pattern, those after which the same command goes on: 75, it has saved or lacks
# the other hosts; 128 and a signal's number, it was killed, or JAX ended it
# with SIGABRT (134) for the loss of another host.
readonly BAD_INPUT=2 GOES_ON='(75|129|1[3-8][0-9]|19[0-2])'

# Set by parse_flags.
dry_run=
command_flags=()

# Ends a launch that no other input would have saved.
give_up() {
  say "error: $*"
  exit 1
}

# parse_flags NAMES SWITCHES ARGUMENT...
#
# --zone=a sets $LAUNCH_ZONE, if `zone` is among NAMES; a switch sets its
# variable to 1. What follows `--` goes to $command_flags.
parse_flags() {
  local names switches name
  # shellcheck disable=SC2086  # into words, with one space around each
  printf -v names ' %s' $1 && printf -v switches ' %s' $2 dry_run
  names+=' ' switches+=' '
  shift 2
  while (($#)); do
    name=${1%%=*}
    name=${name#--}
    name=${name//-/_}
    if [[ $1 == -- ]]; then
      command_flags=("${@:2}")
      break
    elif [[ $1 == --*=* && $names == *" $name "* ]]; then
      export "LAUNCH_${name^^}=${1#*=}"
    elif [[ $1 == --* && $1 != *=* && $switches == *" $name "* ]]; then
      export "LAUNCH_${name^^}=1"
    else
      die "$1: unknown; known: $(known_flags "$names" "$switches")," \
        "and after -- the flags of fulllora_jax.main"
    fi
    shift
  done
  dry_run=${LAUNCH_DRY_RUN:-}
}

known_flags() {
  local name text=
  for name in $1; do text+=" --$name=..."; done
  for name in $2; do text+=" --${name//_/-}"; done
  echo "${text# }"
}

# need NAME MEANING: stops unless the flag, or its variable, was given.
need() {
  local variable=LAUNCH_${1^^}
  [[ -n ${!variable:-} ]] ||
    die "$2 is missing; set --$1=... or the variable $variable"
}

# need_number NAME: stops unless the value is a whole number.
need_number() {
  local variable=LAUNCH_${1^^}
  [[ ${!variable} =~ ^[0-9]+$ ]] ||
    die "--$1=${!variable} ($variable) is not a whole number"
}

need_program() {
  [[ -n $dry_run ]] || command -v "$1" >/dev/null || die "no $1 here; $2"
}

# Prints the words so that a shell reads them back.
quoted() {
  local word text=
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      text+=" $word"
    else
      text+=" ${word@Q}"
    fi
  done
  echo "${text# }"
}

# Runs a command; a dry run prints it instead.
run() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# The line of a program's stderr that says why it failed.
reason() {
  grep -m 1 '^ERROR: ' "$1" || grep -v '^[[:space:]]*$' "$1" | tail -n 1 ||
    echo 'failed without a word'
}
