"""Writes TensorBoard event files from lines of metrics on stdin.

`metrics.MetricWriter` runs this in a process of its own, because clu's writer
imports TensorFlow: 2-3 s, 600 MB and, on an accelerator, a rival for its
memory. It ends at the end of its input, so it never outlives the run.

    python -m fulllora_jax.training.tensorboard LOGDIR < metrics.jsonl
"""

import json
import sys
from collections.abc import Iterable
from typing import Any


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


def write_events(lines: Iterable[str], logdir: str) -> None:
  """Writes every line of metrics to event files in `logdir`, as it comes."""
  from clu import metric_writers  # TensorFlow comes with it

  writer = metric_writers.SummaryWriter(logdir)
  for line in lines:
    row = json.loads(line)
    writer.write_scalars(row['step'], tagged(row))
    writer.flush()  # TensorBoard shows a step when it is done
  writer.close()


if __name__ == '__main__':
  write_events(sys.stdin, sys.argv[1])
