"""Starts the PyTorch peers of a benchmark."""

import contextlib
import os
from collections.abc import Sequence

import jax

from fulllora_jax import data
from fulllora_jax.core.console import say
from fulllora_jax.experiments.speed.torch.peer import TorchPeer, spec_of


def start(
  stack: contextlib.ExitStack,
  config,
  dataset: data.Dataset,
  modes: Sequence[str],
) -> dict[str, TorchPeer]:
  """Starts a peer for each mode, compiled and warm; `stack` ends them.

  They use the same device, or as many threads as this process may.

  Args:
    stack: on leaving it the processes end.
    config: config.py.
    dataset: whose shapes the peers have.
    modes: 'eager', 'compile', ... (torch_spec.py).

  Returns:
    Name in tables -> the peer.

  Raises:
    UserError: as torch_peer.spec_of and TorchPeer.
  """
  device = 'cpu' if jax.default_backend() == 'cpu' else 'cuda'
  running = {}
  for mode in modes:
    spec = spec_of(
      config,
      dataset.num_classes,
      dataset.image_shape,
      mode=mode,
      device=device,
      threads=len(os.sched_getaffinity(0)),
    )
    name = f'torch {spec.method}, {mode}'
    say(f'starting {name}')
    running[name] = stack.enter_context(TorchPeer(spec))
  return running
