"""The process in which PyTorch runs, beside the one that has JAX.

  python -m fulllora_jax.experiments.speed.torch.worker 5

The number is that of an open end of a multiprocessing.Pipe. A Spec comes through it first, and is
answered by what Work.facts returns, or by the UserError that stands in the way; then requests,
('attack', {'steps': 20}) for one, which name a method of Work and its arguments. The process ends
when its stdin does, whatever it is doing.

Imports no JAX, and PyTorch only once it was asked for something.
"""

import os
import sys
import threading
from multiprocessing.connection import Connection

from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.speed.torch.spec import Spec


def main() -> None:
  """Answers requests until stdin ends."""
  threading.Thread(target=_end_with_stdin, daemon=True).start()
  pipe = Connection(int(sys.argv[1]))
  try:
    work = _start(pipe.recv())
    pipe.send(work.facts())
  except UserError as error:
    pipe.send(UserError(' '.join(str(error).split())))
  while True:
    name, arguments = pipe.recv()
    pipe.send(getattr(work, name)(**arguments))


def _end_with_stdin() -> None:
  os.read(0, 1)  # nothing is ever written there
  os._exit(0)  # the parent is gone, or wants nothing more


def _start(spec: Spec):
  """Returns the compiled `Work` of a spec, or raises UserError."""
  try:
    from fulllora_jax.experiments.speed.torch.work import Work
  except ImportError as error:
    raise UserError(
      f'torch peer: it needs torch, torchvision, timm and peft ({error}); pip install -e .[bench]'
    ) from error
  work = Work(spec)
  work.warm_up()
  return work


if __name__ == '__main__':
  main()
