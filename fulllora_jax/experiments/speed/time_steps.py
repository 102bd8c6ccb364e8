"""Steps and evaluations timed side by side, and the files they leave."""

import contextlib
import json

from fulllora_jax import data
from fulllora_jax.core import files
from fulllora_jax.experiments.speed import cases, evaluations, steps
from fulllora_jax.experiments.speed.torch import peer
from fulllora_jax.training import workdir as workdir_lib


def time_steps(config, workdir: str, given) -> None:
  """Times what is asked for; prints the tables, and writes them.

  Args:
    config: config.py.
    workdir: benchmark.json and benchmark.md go there.
    given: the other flags of the command, fulllora_jax/benchmark.py.

  Raises:
    UserError: bad input; a directory that cannot be written.
  """
  path = files.absolute_path(workdir)
  with workdir_lib.writing(path):
    files.make_writable(path)
  if given.data == 'config':
    dataset = data.open_dataset(config.data, config.seed)
  else:
    dataset = cases.random_dataset(config, given.num_classes, channels=3)
  with contextlib.ExitStack() as stack:
    running = {}
    if given.compare:
      running = peer.start(stack, config, dataset, given.torch_modes)
    compiled = steps.compile_cases(config, dataset, given.methods)
    record = steps.measure(compiled, given.rounds, given.warmup, running)
    text = steps.markdown(record)
    if given.attacks:
      record['evaluations'] = evaluations.measure(
        compiled[config.method], given.attacks, given.images, running
      )
      text += '\n' + evaluations.markdown(record['evaluations'])
  numbers = json.dumps(record, indent=2)
  files.replace_file(path / 'benchmark.json', numbers.encode())
  files.replace_file(path / 'benchmark.md', text.encode())
  print(text)
