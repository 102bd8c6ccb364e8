#!/bin/bash
# Measures the train step on one GPU, beside PyTorch: ViT-B/16 at 224 px and
# ViT-B/4 at 32 px, in bfloat16, for some batch sizes.
#
#   pip install -e .[cuda,bench]
#   launch/benchmark_gpu.sh [--rounds=20 ...]
#
# Arguments go to fulllora_jax.benchmark. PYTHON chooses the interpreter, BATCHES
# the batch sizes, MODES those of torch.compile. A batch that does not fit is
# said, and the next one is measured.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
source launch/environment.sh

failed=()
for config in imagenette cifar10; do
  for batch in ${BATCHES:-64 128 256}; do
    "${PYTHON:-python3}" -m fulllora_jax.benchmark \
      --config="configs/$config.py" \
      --config.model.dtype=bfloat16 --config.base.dtype=bfloat16 \
      --config.train.batch_size="$batch" --methods=linear,lora_everywhere,full \
      --compare=torch --torch_modes="${MODES:-compile,compile-cudagraphs}" \
      --attacks=pgd-20 --workdir="runs/benchmark-$config-$batch" "$@" ||
      failed+=("$config with $batch images")
  done
done
if ((${#failed[@]})); then
  echo "not measured: $(IFS=,; echo "${failed[*]}")" >&2
  exit 1
fi
