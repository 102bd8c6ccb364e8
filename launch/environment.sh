# Sourced by every script here, at the root of the repository, with what the
# script was given: --help prints the comment at the head of the script.
#
#   enter_environment EXTRAS
#
# makes the virtual environment $VENV (.venv) with $PYTHON (python3), installs
# the project with pip's EXTRAS (`test`, or nothing) and leaves its interpreter in
# $python. Once that is done, it only checks that setup.py is the same.
# shellcheck shell=bash

say() { echo "$*" >&2; }

die() {
  say "error: $*"
  exit 2
}

# `cd` has left behind where the script's own path starts.
show_help() {
  cd "$OLDPWD"
  sed -n -e 1d -e '/^#/!q' -e '/^#SBATCH/!s/^# \{0,1\}//p' "$0"
  exit 0
}

for argument in "$@"; do
  case $argument in
    --) break ;;
    --help | -h) show_help ;;
  esac
done

enter_environment() {
  local extras=$1 venv=${VENV:-.venv}
  python=$venv/bin/python
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    make_environment "$venv"
  fi
  # In the environment, so that it goes when the environment goes.
  local stamp=$venv/.fulllora_jax-${extras:-plain}
  local want
  want="$PWD $(cksum <setup.py)"
  if [[ -f $stamp && $(<"$stamp") == "$want" ]]; then
    return
  fi
  say "Installing fulllora_jax${extras:+[$extras]} into $venv: the first time" \
    "downloads about 1 GB and takes minutes ..."
  "$python" -m pip install -q --disable-pip-version-check \
    -e ".${extras:+[$extras]}" ||
    die "pip could not install the project into $venv; its message is above"
  echo "$want" >"$stamp"
}

make_environment() {
  local venv=$1 base=${PYTHON:-python3}
  if [[ -e $venv && ! -e $venv/pyvenv.cfg ]]; then
    die "VENV=$venv exists and is not a virtual environment; name another"
  fi
  check_python "$base"
  if ! has_venv "$base"; then
    install_venv "$base"
  fi
  say "Making the virtual environment $venv ..."
  "$base" -m venv --clear "$venv" ||
    die "$base could not make the virtual environment $venv"
}

check_python() {
  command -v "$1" >/dev/null ||
    die "no $1 here; install Python 3.11 or newer, or set PYTHON to one"
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$1 is $("$1" --version 2>&1); 3.11 or newer is needed: set PYTHON"
}

# Debian leaves ensurepip, without which venv makes no pip, to a package.
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

install_venv() {
  local base=$1 package
  package=python$("$base" -c \
    'import sys; print("%d.%d" % sys.version_info[:2])')-venv
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    say "Installing the Debian package $package ..."
    apt-get update -qq >&2 || say "warning: apt-get update failed"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package" >&2 || true
  fi
  has_venv "$base" ||
    die "$base lacks the venv module; on Debian: sudo apt install $package"
}
