"""The GPU benchmark's script: what it runs, and what it says of failures."""

import os
import subprocess
from pathlib import Path

from fulllora_jax import benchmark

ROOT = Path(__file__).parents[2]


def run(tmp_path, fails=''):
  """Runs the script with a python that records its arguments."""
  log = tmp_path / 'log'
  stand_in = tmp_path / 'python'
  stand_in.write_text(f'#!/bin/bash\necho "$*" >>{log}\n[[ -z "{fails}" || "$*" != *{fails}* ]]\n')
  stand_in.chmod(0o755)
  done = subprocess.run(
    [ROOT / 'launch' / 'benchmark_gpu.sh', '--rounds=3'],
    env={**os.environ, 'PYTHON': str(stand_in), 'BATCHES': '64 128'},
    capture_output=True,
    text=True,
  )
  return done, [line.split() for line in log.read_text().splitlines()]


def test_it_measures_each_config_with_each_batch(tmp_path):
  done, calls = run(tmp_path)
  assert done.returncode == 0, done.stderr
  assert [(call[2], call[5], call[-1]) for call in calls] == [
    (f'--config=configs/{config}.py', f'--config.train.batch_size={batch}',
     '--rounds=3')
    for config in ('imagenette', 'cifar10')
    for batch in (64, 128)
  ]  # fmt: skip


def test_its_flags_are_those_of_the_command(tmp_path):
  _, (call, *_) = run(tmp_path)
  given = {a.lstrip('-').split('=')[0].split('.')[0] for a in call[2:]}
  source = Path(benchmark.__file__).read_text()
  assert given >= {'config', 'methods', 'compare', 'workdir'}
  assert all(f"'{name}'" in source for name in given)


def test_what_fails_is_named_and_the_rest_is_measured(tmp_path):
  done, calls = run(tmp_path, fails='batch_size=128')
  assert done.returncode == 1 and len(calls) == 4
  assert done.stderr.splitlines()[-1] == (
    'not measured: imagenette with 128 images,cifar10 with 128 images'
  )
