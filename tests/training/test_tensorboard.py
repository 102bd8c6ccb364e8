"""Event files, by the process that writes them."""

import importlib.util
import json
import subprocess
import sys

import pytest

from fulllora_jax.training.metrics import MetricWriter
from fulllora_jax.training.tensorboard import tagged

_READER = """
import json, sys
import tensorflow as tf
rows = []
for event in tf.compat.v1.train.summary_iterator(sys.argv[1]):
  for value in event.summary.value:
    number = float(tf.make_ndarray(value.tensor))
    rows.append((event.step, value.tag, number))
print(json.dumps(rows))
"""


def test_tags():
  row = {'step': 3, 'kind': 'validation', 'clean_accuracy': 0.5, 'x': None}
  assert tagged(row) == {'validation/clean_accuracy': 0.5}


@pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ('clu', 'tensorflow', 'tensorboard'))),
  reason='needs clu, tensorflow and tensorboard',
)
def test_event_files(tmp_path):
  before = 'tensorflow' in sys.modules
  with MetricWriter(tmp_path, tensorboard=True, start_step=0) as writer:
    for step in (1, 2):
      writer.write(step, 'train', {'loss': 1 / step, 'norm': float('nan')})
    writer.write(2, 'validation', {'clean_accuracy': 0.25})
  assert ('tensorflow' in sys.modules) == before
  (path,) = (tmp_path / 'tensorboard').iterdir()
  assert path.name.startswith('events.out.tfevents.')
  # In a process of its own as well: reading imports TensorFlow.
  process = subprocess.run(
    [sys.executable, '-c', _READER, str(path)], capture_output=True, text=True, timeout=400
  )
  assert process.returncode == 0, process.stderr
  assert json.loads(process.stdout) == [
    [1, 'train/loss', 1.0],
    [2, 'train/loss', 0.5],
    [2, 'validation/clean_accuracy', 0.25],
  ]
