"""The process in which PyTorch runs, beside the one that has JAX.

  python -m fulllora_jax.experiments.speed.torch.worker

Reads requests from stdin, one JSON value a line: first the fields of a Spec,
then ['run', {'steps': 3}] and the like, by the methods of `Work`. Answers each
with a line on stdout, {'answer': ...} or {'error': ...}. It ends when stdin
does, whatever it is doing.

Imports no JAX, and PyTorch only once it was asked for something.
"""

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.speed.torch.spec import Spec

_METHODS = ('run', 'run_attack', 'peak_memory')


def main() -> None:
  """Answers requests until stdin ends."""
  answers = _claim_stdout()
  requests: queue.Queue[str] = queue.Queue()
  threading.Thread(target=_listen, args=(requests,), daemon=True).start()

  work = None

  def answer(request: Any) -> Any:
    nonlocal work
    if work is None:
      work = _start(request)
      return {'compile_seconds': work.warm_up(), **work.facts()}
    name, arguments = request
    if name not in _METHODS:
      raise ValueError(f'unknown request {name!r}')
    return getattr(work, name)(**arguments)

  while True:
    reply = _attempt(answer, json.loads(requests.get()))
    print(json.dumps(reply), file=answers, flush=True)


def _claim_stdout():
  """Returns a file on stdout; what others print there goes to stderr."""
  own = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  return own


def _listen(requests: queue.Queue) -> None:
  for line in sys.stdin:
    requests.put(line)
  os._exit(0)  # the parent is gone, or wants nothing more


def _start(fields: dict[str, Any]):
  try:
    from fulllora_jax.experiments.speed.torch import work as work_lib
  except ImportError as error:
    raise UserError(
      f'torch peer: it needs torch, torchvision, timm and peft ({error}); '
      'pip install -e .[bench]'
    ) from error
  lists = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
  return work_lib.Work(Spec(**fields | lists))


def _attempt(function: Callable, request: Any) -> dict[str, Any]:
  try:
    return {'answer': function(request)}
  except UserError as error:
    return {'error': ' '.join(str(error).split())}
  except Exception:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # Python's own exit would trip over the thread at stdin


if __name__ == '__main__':
  main()
