"""Writes TensorBoard event files of what metrics.jsonl holds, and will hold.

`metrics.MetricWriter` runs this in a process of its own, because clu's writer
imports TensorFlow: 2-3 s, 600 MB and, on an accelerator, a rival for its
memory. It ends after its stdin, so it never outlives the run.

    python -m fulllora_jax.training.tensorboard WORKDIR
"""

import json
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from fulllora_jax.core import files

_PAUSE = 2.0  # seconds between two looks at the file


def tagged(row: dict[str, Any]) -> dict[str, float]:
  """Returns the scalars of one row under their TensorBoard tags.

  >>> tagged({'step': 5, 'kind': 'train', 'loss': 2.0, 'gradient_norm': None})
  {'train/loss': 2.0}
  """
  return {
    f'{row["kind"]}/{name}': value
    for name, value in row.items()
    if name not in ('step', 'kind') and value is not None
  }


def whole_lines(path: Path, stdin: IO) -> Iterator[bytes]:
  """Yields the lines of a file as they come, until `stdin` has ended."""
  ended, seen, is_last = threading.Event(), 0, False

  def await_end():
    stdin.read()
    ended.set()

  threading.Thread(target=await_end, daemon=True).start()
  while not is_last:
    is_last = ended.wait(_PAUSE)
    content = files.read_file(path) if path.exists() else b''
    end = content.rfind(b'\n') + 1
    yield from content[seen:end].splitlines(keepends=True)
    seen = end


def write_events(lines: Iterable[bytes], logdir: str) -> None:
  """Writes every line of metrics to event files in `logdir`, as it comes."""
  from clu import metric_writers  # TensorFlow comes with it

  writer = metric_writers.SummaryWriter(logdir)
  for line in lines:
    row = json.loads(line)
    writer.write_scalars(row['step'], tagged(row))
    writer.flush()  # TensorBoard shows a step when it is done
  writer.close()


if __name__ == '__main__':
  workdir = files.as_path(sys.argv[1])
  write_events(whole_lines(workdir / 'metrics.jsonl', sys.stdin), str(workdir / 'tensorboard'))
