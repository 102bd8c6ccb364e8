"""Steps and evaluations timed side by side, and the files they leave."""

import contextlib
import json
from collections.abc import Sequence

from fulllora_jax import data
from fulllora_jax.core import files
from fulllora_jax.experiments.speed import cases, evaluations, steps
from fulllora_jax.experiments.speed.torch import peer
from fulllora_jax.training import workdir as workdir_lib


def time_steps(
  config,
  workdir: str,
  *,
  methods: Sequence[str],
  rounds: int,
  warmup: int,
  num_classes: int | None,
  torch_modes: Sequence[str],
  attacks: Sequence[str],
  images: int,
) -> None:
  """Times what is asked for; prints the tables, and writes them.

  Args:
    config: config.py.
    workdir: benchmark.json and benchmark.md go there.
    methods: other methods to time beside the config's.
    rounds: timed steps of each.
    warmup: steps before them.
    num_classes: of random images; None: the data of the config.
    torch_modes: how PyTorch does the same work: 'eager', 'compile'.
    attacks: evaluations to time, such as 'pgd-20'.
    images: that the evaluations are timed on.

  Raises:
    UserError: bad input; a directory that cannot be written.
  """
  path = files.absolute_path(workdir)
  with workdir_lib.writing(path):
    files.make_writable(path)
  if num_classes is None:
    dataset = data.open_dataset(config.data, config.seed)
  else:
    dataset = cases.random_dataset(config, num_classes, channels=3)
  with contextlib.ExitStack() as stack:
    running = {}
    if torch_modes:
      running = peer.start(stack, config, dataset, torch_modes)
    compiled = steps.compile_cases(config, dataset, methods)
    record = steps.measure(compiled, rounds, warmup, running)
    text = steps.markdown(record)
    if attacks:
      record['evaluations'] = evaluations.measure(
        compiled[config.method], attacks, images, running
      )
      text += '\n' + evaluations.markdown(record['evaluations'])
  numbers = json.dumps(record, indent=2)
  files.replace_file(path / 'benchmark.json', numbers.encode())
  files.replace_file(path / 'benchmark.md', text.encode())
  print(text)
