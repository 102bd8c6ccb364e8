"""How much of an adapter: from the base to the adapter, to the bit at both ends."""

import types

import jax
import numpy as np
import pytest
from test_many_adapters import another, evaluate, noisy, refused

from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.serving import classifier

STRENGTHS = (0.0, 0.3, 1.0, 0.3, 0.0, 1.0)
SILENT = ('lora_b', 'up', 'up_bias')


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).uniform(size=(6, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope='module')
def run(finished, tmp_path_factory):
  return another(finished, tmp_path_factory.mktemp('strength') / 'run', noisy)


@pytest.fixture(scope='module')
def many(finished, run):
  return classifier.load({'robust': run, 'other': finished.workdir})


def dialled(base, strength):
  """Changes an adapter's leaves, by hand, to what it is at a strength."""
  base = trees.named_leaves(artefact.read_artefact(base)[0])

  def change(leaves, metadata):
    del metadata
    for path, leaf in leaves.items():
      if path.startswith('params/'):
        leaves[path] = base[path] + strength * (leaf - base[path])
      elif path.split('/')[-1] in SILENT:
        leaves[path] = leaf * strength

  return change


def compiled_by(call):
  events = []
  listener = lambda event, *_, **__: events.append(event)  # noqa: E731
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    call()
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  return [event for event in events if 'compile' in event]


@pytest.fixture(scope='module')
def alone(run, images, tmp_path_factory):
  """strength -> the logits of a run whose leaves were scaled by hand."""
  whole = classifier.load(run)
  copied = another(
    types.SimpleNamespace(workdir=run), tmp_path_factory.mktemp('third') / 'run',
    dialled(run / 'base' / 'best', 0.3),
  )  # fmt: skip
  return {
    0.0: np.asarray(whole.base_logits(images)),
    0.3: np.asarray(classifier.load(copied).logits(images)),
    1.0: np.asarray(whole.logits(images)),
  }


def test_one_strength_for_all_images(many, images, alone):
  for strength in (0.0, 1.0):
    np.testing.assert_array_equal(many.logits(images, 'robust', strength), alone[strength])
  np.testing.assert_allclose(many.logits(images, 'robust', 0.3), alone[0.3], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(many.logits(images, 'base', 0.3), alone[0.0])
  assert np.abs(alone[0.3] - alone[0.0]).max() > 0.01 < np.abs(alone[0.3] - alone[1.0]).max()
  classes = many.predict(images, 'robust', 0.3)
  np.testing.assert_array_equal(classes, alone[0.3].argmax(axis=1))


def test_a_strength_for_each_image(many, images, alone):
  expected = np.stack([alone[s][i] for i, s in enumerate(STRENGTHS)])
  for adapter in ('robust', ['robust'] * 6):
    found = many.logits(images, adapter, STRENGTHS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  # In one program the ends are those of adapters named for each image, to the bit.
  names = ['base', 'robust', 'robust', 'other', 'base', 'other']
  ends = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
  held = ['robust', 'robust', 'robust', 'other', 'other', 'other']
  np.testing.assert_array_equal(many.logits(images, held, ends), many.logits(images, names, 1.0))


def test_no_strength_compiles_anything(many, images):
  many.logits(images, 'robust', 0.5)
  many.logits(images, 'robust', STRENGTHS)
  again = compiled_by(
    lambda: [many.logits(images, 'other', s) for s in (0.0, 0.7, 1, STRENGTHS[::-1])]
  )
  assert not again


def test_strengths_travel_with_their_images_through_an_ensemble(many):
  x = np.random.default_rng(5).uniform(size=(12, 8, 8, 1)).astype(np.float32)
  strengths = np.array([(0.0, 0.4, 1.0)[i % 3] for i in range(len(x))])
  labels = np.asarray(many.predict(x, 'robust', strengths))
  together = evaluate(many.logits_fn('robust', strengths), x, labels, np.arange(12), 5)
  assert 0 < together.robust.sum() < len(x)
  for strength in (0.0, 0.4, 1.0):
    rows = np.flatnonzero(strengths == strength)
    one = evaluate(many.logits_fn('robust', strength), x, labels, rows, 5)
    np.testing.assert_array_equal(together.robust[rows], one.robust)
    np.testing.assert_allclose(together.x_adv[rows], one.x_adv, atol=1e-6)


@pytest.mark.parametrize(
  ('adapter', 'strength', 'words'),
  [
    ('robust', 1.5, r'strength 1.5: give a number in 0..1, or one for each image; 0 is the base'),
    ('robust', -0.1, r'strength -0.1: give a number in 0..1'),
    ('robust', float('nan'), r'strength nan: give a number in 0..1'),
    ('robust', 'half', r'strength half: give a number in 0..1'),
    ('robust', [[0.5]], r'strength \[\[0.5\]\]: give a number in 0..1'),
    ('robust', [0.1, 2.0], r'strength \[0.1, 2.0\]: give a number in 0..1'),
    ('robust', [0.1, 0.2], 'adapter and strength are 2 for 6 images; give one name, or one for'),
    (['robust'] * 6, [0.1, 0.2], 'strength has 2 numbers for 6 names; give one number, or as many'),
  ],
)
def test_a_wrong_strength_is_refused(many, images, adapter, strength, words):
  refused(words, lambda: many.logits(images, adapter, strength))


@pytest.fixture
def of_method(write_run, tiny_config, tmp_path):
  def load(method):
    write_run(tmp_path / 'run', tiny_config(method, pool='mean'))
    return tmp_path / 'run', classifier.load({'own': tmp_path / 'run'})

  return load


@pytest.mark.parametrize('method', ['lora', 'adapter', 'adaptformer'])
def test_other_branches_are_scaled_too(of_method, method):
  run, many = of_method(method)
  x = np.random.default_rng(1).uniform(size=(3, 8, 8, 3)).astype(np.float32)
  whole = classifier.load(run)
  np.testing.assert_array_equal(many.logits(x, 'own', 0.0), whole.base_logits(x))
  np.testing.assert_array_equal(many.logits(x, 'own', 1.0), whole.logits(x))
  copied = another(
    types.SimpleNamespace(workdir=run), run.parent / 'third', dialled(run / 'base' / 'best', 0.3)
  )
  third = classifier.load(copied, base=run / 'base').logits(x)
  np.testing.assert_allclose(many.logits(x, 'own', 0.3), third, rtol=1e-4, atol=1e-5)
  each = many.logits(x, 'own', [0.3, 1.0, 0.3])
  np.testing.assert_allclose(each[::2], third[::2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('method', 'why'),
  [
    ('linear', 'method linear has no branches to scale'),
    ('bias', 'method bias has no branches to scale'),
    ('vpt', 'prompts change the base, whatever their numbers'),
  ],
)
def test_a_method_without_branches_has_no_strength(of_method, method, why):
  _, many = of_method(method)
  x = np.zeros((1, 8, 8, 3), np.float32)
  refused(f'strength: nothing is between these .* base: {why}', lambda: many.logits(x, 'own', 0.5))


def test_where_the_base_has_no_head_the_trained_one_stays(run, many, images, tmp_path):
  def headless(leaves, metadata):
    del leaves
    metadata['base_source'] = {'new_head': True, 'source': 'x', 'files': {}}

  own = another(types.SimpleNamespace(workdir=run), tmp_path / 'run', headless)
  bare = classifier.load({'robust': own}, base=own / 'base')
  assert bare.names == ('robust',)
  np.testing.assert_array_equal(bare.logits(images, 'robust', 1.0), many.logits(images, 'robust'))

  def silent(leaves, metadata):
    del metadata
    for path in leaves:
      if path.endswith('lora_b'):
        leaves[path] = leaves[path] * 0

  body = another(types.SimpleNamespace(workdir=run), tmp_path / 'silent', silent)
  expected = classifier.load(body).logits(images)
  np.testing.assert_array_equal(bare.logits(images, 'robust', 0.0), expected)
  each = bare.logits(images, 'robust', [0.0] * 6)
  np.testing.assert_allclose(each, expected, rtol=1e-4, atol=1e-5)
