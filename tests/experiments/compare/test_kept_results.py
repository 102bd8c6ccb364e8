"""The weights under docs/results: they load, and give their table again."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import fulllora_jax
from fulllora_jax import config as config_lib
from fulllora_jax import data

KEPT = pathlib.Path(__file__).parents[3] / 'docs' / 'results' / 'cifar10_cpu'
METHODS = sorted(
  path.stem for path in (KEPT / 'adapters').glob('*.safetensors') if path.stem != 'base'
)


def load(method):
  folder = KEPT / 'adapters'
  return fulllora_jax.load(folder / f'{method}.safetensors', base=folder / 'base.safetensors')


def report_of(method):
  return json.loads((KEPT / 'reports' / f'{method}.json').read_text())


def test_every_row_of_the_table_is_kept():
  rows = (KEPT / 'comparison.csv').read_text().splitlines()[1:]
  assert {row.split(',')[0] for row in rows} == set(METHODS)
  files = [path for path in KEPT.rglob('*') if path.is_file()]
  assert sum(path.stat().st_size for path in files) < 8e6


@pytest.mark.parametrize('method', METHODS)
def test_kept_weights_stand_on_the_kept_base(method):
  classifier = load(method)
  report = report_of(method)
  for key in ('base_fingerprint', 'parameters'):
    assert classifier.metadata[key] == report[key]
  logits = classifier.logits(np.zeros((2, 32, 32, 3), np.float32))
  assert logits.shape == (2, 10) and np.isfinite(logits).all()


@pytest.mark.slow
@pytest.mark.usefixtures('needs_cifar10', 'one_device')
def test_kept_weights_give_their_accuracy_again():
  classifier = load('fulllora')
  config = config_lib.from_mapping(classifier.metadata['config'])
  test = data.open_dataset(config.data, config.seed).test
  chosen = data.choose_examples(len(test), 500, config.seed)
  images = jnp.asarray(test.fetch(chosen), jnp.float32) / 255
  correct = int((classifier.predict(images) == test.labels[chosen]).sum())
  known = report_of('fulllora')['evaluations'][0]
  assert (known['attack'], known['num_examples']) == ('clean', 500)
  # Another compiler rounds otherwise.
  assert abs(correct - known['num_correct']) <= 2
