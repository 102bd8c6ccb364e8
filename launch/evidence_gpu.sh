#!/bin/bash
# Runs the inherited protocol on a machine with one GPU and without network, as
# far as the minutes reach: ViT-Ti/4 from the published ViT-Ti/16, CIFAR-10 at
# 32 px, PGD-10, SGD, every method, then AutoAttack on 1,000 test images.
#
#   launch/evidence_gpu.sh 25        # there; the same again goes on
#   launch/evidence_gpu.sh 0         # takes in what was carried, trains nothing
#   launch/evidence_gpu.sh 0 2       # gives the second portion of the state
#   launch/evidence_gpu.sh 25 -- --config.experiment.model.dtype=bfloat16
#
# Every prefix is worth having: first all methods for a tenth of the epochs
# (`:vit_ti_gpu_short`), FullLoRA and full finetuning before the others, and
# each is attacked as soon as it is trained; then the whole protocol in the same
# order (`:vit_ti_gpu`). It stops by itself, its state saved, before the minutes
# are over.
#
# $EVIDENCE (evidence) holds what was carried there: carry-*, which
# launch/evidence_pack.py makes, in several calls where one takes less, and on
# a fresh machine state-*, which an earlier machine gave back in $OUT
# ($EVIDENCE/out): results.csv, and the state in portions of $PORTION_MIB (60).
# Save each portion as a state-* folder. Flags after -- go to
# fulllora_jax.compare, the same ones each time. Other variables: PYTHON,
# STAGES, ROWS, DEVICE (gpu; cpu to try it out), SAVE_SECONDS (60) that it keeps
# for stopping and saving, LEAST_SECONDS (60) for which it begins a run.
#
# Exits with 0 (all is done), 75 (the same command goes on), 1 (a run failed),
# 2 (bad input, or a part is missing).
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
source launch/environment.sh
shopt -s nullglob

readonly evidence=${EVIDENCE:-evidence}
readonly here=$evidence/here out=${OUT:-$evidence/out}
readonly python=${PYTHON:-python3} portion_mib=${PORTION_MIB:-60}
readonly save_seconds=${SAVE_SECONDS:-60} least_seconds=${LEAST_SECONDS:-60}
readonly config=configs/compare_cifar10.py
read -ra stages <<<"${STAGES:-$config:vit_ti_gpu_short $config:vit_ti_gpu}"
read -ra rows <<<"${ROWS:-fulllora full lora lora_everywhere linear}"

minutes=${1:-} portion=1 flags=()
[[ $minutes =~ ^[0-9]+$ ]] ||
  die "MINUTES=$minutes: give a whole number, as in launch/evidence_gpu.sh 25"
shift
if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  portion=$1
  shift
fi
if [[ ${1:-} == -- ]]; then
  flags=("${@:2}")
elif (($#)); then
  die "$1: unknown; flags of fulllora_jax.compare come after --"
fi

seconds_left() { echo $((minutes * 60 - SECONDS - save_seconds)); }

# same_lists KIND FOLDER LIST...: all folders of a kind must be of one time.
# Copies their list of parts to FOLDER.
same_lists() {
  local kind=$1 folder=$2 list
  shift 2
  [[ -e $folder/parts.sha256 ]] || cp "$1" "$folder/parts.sha256"
  for list in "$@"; do
    [[ $(<"$folder/parts.sha256") == "$(<"$list")" ]] ||
      die "${list%/*} is not of the same time as what came before it; carry" \
        "$kind of one time, and remove the others and $folder"
  done
}

# whole FILE SUM: stops where a file was damaged on its way.
whole() {
  local sum _
  read -r sum _ < <(sha256sum "$1")
  [[ $sum == "$2" ]] || die "$1 is damaged; carry it again"
}

# Unpacks the parts that are here and were not unpacked before; sets $missing.
take_pack() {
  local lists=("$evidence"/carry-*/parts.sha256) list sum name
  mkdir -p "$here/taken"
  if ((${#lists[@]})); then
    same_lists 'carry-*' "$here/taken" "${lists[@]}"
  fi
  [[ -e $here/taken/parts.sha256 ]] ||
    die "no $evidence/carry-1 here; make it where there is a network:" \
      'python launch/evidence_pack.py --help'
  missing=()
  while read -r sum name; do
    [[ ! -e $here/taken/$name ]] || continue
    list=("$evidence"/carry-*/"$name")
    if ((${#list[@]})); then
      whole "${list[0]}" "$sum"
      say "Unpacking $name ..."
      tar -xzf "${list[0]}" -C "$here"
      touch "$here/taken/$name"
    else
      missing+=("$name")
    fi
  done <"$here/taken/parts.sha256"
}

# Takes up the runs of an earlier machine, unless this one has its own.
take_state() {
  local lists=("$evidence"/state-*/parts.sha256) sum name file
  if [[ -e $here/runs ]]; then return; fi
  if ((${#lists[@]} == 0)) && [[ ! -e $here/came ]]; then return; fi
  mkdir -p "$here/came"
  if ((${#lists[@]})); then
    same_lists 'state-*' "$here/came" "${lists[@]}"
  fi
  while read -r sum name; do
    [[ ! -e $here/came/$name ]] || continue
    file=("$evidence"/state-*/"$name")
    if ((${#file[@]})); then
      whole "${file[0]}" "$sum"
      cp "${file[0]}" "$here/came/$name"
    else
      missing+=("$name")
    fi
  done <"$here/came/parts.sha256"
  if ! ((${#missing[@]})); then
    cat "$here"/came/state.* | tar -xz -C "$here"
    rm -r "$here/came"
    say 'Took up the state of an earlier call.'
  fi
}

check_machine() {
  local said
  said=$("$python" -c 'import jax
from fulllora_jax.experiments.compare import compare
print(jax.default_backend(), jax.devices()[0].device_kind)' 2>&1 | tail -n 1) ||
    die "$python cannot import what is needed: $said; add it to the pack" \
      '(launch/evidence_pack.py --more), or set PYTHON'
  [[ $said == "${DEVICE:-gpu} "* ]] ||
    die "JAX has no ${DEVICE:-gpu} here but: $said; set PYTHON to one that has," \
      'or DEVICE=cpu to try it out'
  say "Computing on: $said."
}

# Runs a command for at most so many seconds; SIGTERM, which this script may
# get too, lets a training save first.
child='' stopped=''
trap 'stopped=1; [[ -z $child ]] || kill -TERM "$child"' TERM INT
limited() {
  local limit=$1 code=0
  shift
  timeout --signal=TERM --kill-after="$((save_seconds / 2))" "$limit" "$@" &
  child=$!
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do  # a trap ended the wait, not the child
    code=0
    wait "$child" || code=$?
  done
  child=''
  return "$code"
}

# train STAGE ROW: one method, trained and attacked, or as far as time allows.
train() {
  local stage=$1 row=$2 name=${1##*:} code=0
  local run=$here/runs/$name/runs/$row-0
  if [[ -e $run/report.md || -e $run/diverged.json ]]; then
    say "$name, $row: finished"
    return
  fi
  if [[ -n $stopped ]] || (($(seconds_left) < least_seconds)); then
    return 75
  fi
  say "$name, $row: training, then attacks; $(seconds_left) s are left"
  limited "$(seconds_left)" "$python" -m fulllora_jax.compare \
    "--config=$stage" "--workdir=$here/runs/$name" "--rows=$row" \
    "--config.experiment.data.name=folder:$here/images" \
    "--config.experiment.base.source=$(base "$name")" "${flags[@]}" || code=$?
  if ((code == 0)); then return; fi
  if [[ -n $stopped || $code == 75 ]] || (($(seconds_left) <= 0)); then
    say "$name, $row: stopped; the next call goes on from there"
    return 75
  fi
  failed+=("$name $row (exit $code)")
  say "$name, $row: failed (exit $code), its message is above; the others go on"
}

# base COMPARISON: the base that another one made, or the published file.
base() {
  local made=("$here"/runs/*/base/best) weights=("$here"/weights/*)
  if ((${#made[@]})) && [[ ${made[0]} != "$here/runs/$1/"* ]]; then
    echo "${made[0]%/best}"
  else
    echo "${weights[0]}"
  fi
}

# Of what is finished only the results and a small adapter go along; of what is
# not, its newest checkpoint.
left_behind() {
  local run steps step
  for run in runs/*/runs/*/; do
    run=${run%/}
    echo "$run/last"
    if [[ -e $run/report.md ]]; then
      printf '%s\n' "$run"/{checkpoints,good,evaluations}
      if (($(du -sm "$run/best" | cut -f1) > 8)); then echo "$run/best"; fi
    else
      steps=("$run"/checkpoints/*/)
      for step in "${steps[@]}"; do
        [[ ${step%/} =~ /[0-9]+$ ]] || echo "${step%/}"
      done
      printf '%s\n' "${steps[@]%/}" | grep -E '/[0-9]+$' | sort -t/ -k6n |
        head -n -1 || true
    fi
  done
}

# Writes the state in parts, and one portion of them to $OUT.
give_state() {
  [[ -e $here/runs ]] || return 0
  local given=$here/given each=$((portion_mib < 15 ? portion_mib : 15)) parts
  if ((portion == 1)) || [[ ! -e $given/parts.sha256 ]]; then
    rm -rf "$given"
    mkdir -p "$given"
    (cd "$here" && left_behind >given/left_behind &&
      tar -c --exclude-from=given/left_behind --exclude='*.lock' runs) |
      gzip -1 | split -b "${each}M" -d -a 2 - "$given/state."
    (cd "$given" && sha256sum state.* >parts.sha256)
  fi
  parts=("$given"/state.*)
  local many=$((portion_mib / each)) portions
  portions=$(((${#parts[@]} + many - 1) / many))
  ((portion <= portions)) || die "there are $portions portions, not $portion"
  mkdir -p "$out"
  rm -f "$out"/state.*
  cp "${parts[@]:(portion - 1) * many:many}" "$given/parts.sha256" "$out"
  say "State: $(du -cm "${parts[@]}" | tail -n 1 | cut -f1) MiB, portion" \
    "$portion of $portions is in $out: keep it as $evidence/state-$portion" \
    "there$( ((portion == portions)) || echo ", and get the next one by" \
      "launch/evidence_gpu.sh 0 $((portion + 1))")."
}

give_results() {
  [[ -e $here/runs ]] || return 0
  mkdir -p "$out"
  "$python" - "$here/runs" >"$out/results.csv" <<'END'
import csv, json, pathlib, sys

table = csv.writer(sys.stdout)
table.writerow('comparison,run,attack,eps,accuracy,images,best_step,passes,train_seconds,device'.split(','))
for path in sorted(pathlib.Path(sys.argv[1]).glob('*/runs/*/report.json')):
  report = json.loads(path.read_text())
  run = path.parent
  for row in report['evaluations']:
    if row['weights'] != 'base':
      label = f'{row["attack"]}-{row["steps"]}' if row['steps'] else row['attack']
      table.writerow([run.parents[1].name, run.name, label, row['eps'], row['accuracy'],
                      row['num_examples'], report['best_step'], report['passes'],
                      report['seconds']['train'], report['device']])
END
  say "Results of what is finished: $out/results.csv"
}

mkdir -p "$here"
take_pack
take_state
if ((${#missing[@]})); then
  if ((minutes)); then die "missing: ${missing[*]}; carry the other folders too"; fi
  say "Still missing: ${missing[*]}; carry the other folders too."
  exit 0
fi
whole_here=$(cd "$here" && pwd)
export PYTHONPATH=$whole_here/site:$PWD${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$whole_here/xla}
code=0 failed=()
if ((minutes)); then
  check_machine
  for stage in "${stages[@]}"; do
    for row in "${rows[@]}"; do
      if ((code == 0)); then train "$stage" "$row" || code=$?; fi
    done
  done
fi
give_results
give_state
if ((${#failed[@]})); then
  say "failed: $(IFS=,; echo "${failed[*]}")"
  exit 1
fi
if ((minutes == 0)); then exit 0; fi
say "$( ((code)) && echo 'More is to do: the same command goes on.' ||
  echo 'All is done.') ${SECONDS} s of $((minutes * 60)) were used."
exit "$code"
