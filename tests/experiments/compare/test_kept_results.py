"""The weights under docs/results: they load, and give their table again."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import fulllora_jax
from fulllora_jax.evaluation import evaluate
from fulllora_jax.training import workdir as workdir_lib

RESULTS = pathlib.Path(__file__).parents[3] / 'docs' / 'results'
KEPT = RESULTS / 'cifar10_cpu'
RUNS = sorted(path.name for path in (KEPT / 'runs').iterdir())


def report_of(name):
  return json.loads((KEPT / 'runs' / name / 'report.json').read_text())


def test_every_row_of_the_table_is_kept():
  rows = (KEPT / 'comparison.csv').read_text().splitlines()[1:]
  assert {f'{row.split(",")[0]}-0' for row in rows} == set(RUNS)
  files = [path for path in KEPT.rglob('*') if path.is_file()]
  assert sum(path.stat().st_size for path in files) < 16e6


@pytest.mark.parametrize('name', RUNS)
def test_kept_weights_stand_on_the_kept_base(name):
  classifier = fulllora_jax.load(KEPT / 'runs' / name)
  report = report_of(name)
  for key in ('base_fingerprint', 'parameters'):
    assert classifier.metadata[key] == report[key]
  logits = classifier.logits(np.zeros((2, 32, 32, 3), np.float32))
  assert logits.shape == (2, 10) and np.isfinite(logits).all()


@pytest.mark.usefixtures('needs_cifar10', 'one_device')
def test_kept_weights_give_their_accuracy_again(tmp_path):
  shutil.copytree(KEPT / 'base', tmp_path / 'base')
  copied = tmp_path / 'runs' / 'fulllora-0'
  shutil.copytree(KEPT / 'runs' / 'fulllora-0', copied)
  config = workdir_lib.read_config(copied)
  config.eval.attacks = ('clean',)
  found = evaluate.evaluate_again(config, copied, ['best'], 'test', 'highest')
  (one,) = found['evaluations']
  known = report_of('fulllora-0')['evaluations'][0]
  assert one['attack'] == known['attack'] and one['num_examples'] == 500
  # Another compiler rounds otherwise.
  assert abs(one['accuracy'] - known['accuracy']) < 0.005
