#!/bin/bash
# Lints, checks format and types, and runs the tests; exits non-zero if any
# fails.
#
#   launch/test.sh [--all] [-k wilson ...]
#
# Without --all, tests that are slow by nature (the mark `slow`) are left out.
# Other arguments go to pytest. VENV and PYTHON choose the environment and the
# interpreter.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
source launch/environment.sh

enter_environment test

marks='not slow'
if [[ ${1:-} == --all ]]; then
  marks=''
  shift
fi

failed=()
check() {
  local name=$1
  shift
  "$python" -m "$@" || failed+=("$name")
}
# All of them, so that one run shows all there is to mend.
check 'ruff check' ruff check
check 'ruff format' ruff format --check
check mypy mypy
# Two at a time, each file by one: what a file starts from is made once. In the
# order of tests/conftest.py, the longest files first.
check tests pytest tests -n 2 --dist loadfile --no-loadscope-reorder \
  -m "$marks" "$@"
# These need PyTorch, which is an extra.
check doctests pytest --doctest-modules fulllora_jax -q \
  --ignore=fulllora_jax/evaluation/of_torch.py \
  --ignore=fulllora_jax/serving/torch_adapter.py \
  --ignore=fulllora_jax/serving/timm_vit.py \
  --ignore=fulllora_jax/experiments/speed/torch/step.py \
  --ignore=fulllora_jax/experiments/speed/torch/work.py

if ((${#failed[@]})); then
  say "FAILED: $(IFS=,; echo "${failed[*]}")"
  exit 1
fi
say "All passed in $SECONDS s."
