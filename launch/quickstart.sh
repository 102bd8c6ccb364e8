#!/bin/bash
# From a bare Python 3.11 to a robust ViT: installs the project into .venv,
# then trains a base and its adapter on scikit-learn's digits, on any CPU.
#
#   launch/quickstart.sh [--config.train.steps=100 ...]
#
# Arguments go to fulllora_jax.main; paths in them start at the root of the
# repository. VENV and PYTHON choose the environment and the interpreter.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
source launch/environment.sh

workdir=runs/digits
previous=
for argument in "$@"; do
  case $argument in
    --workdir=* | -workdir=*) workdir=${argument#*=} ;;
  esac
  case $previous in
    --workdir | -workdir) workdir=$argument ;;
  esac
  previous=$argument
done

enter_environment ''
"$python" -m fulllora_jax.main --config configs/digits.py "$@"
say "Done in $SECONDS s. The report: $workdir/report.md"
