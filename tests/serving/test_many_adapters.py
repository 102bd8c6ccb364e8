"""Several adapters on one base: each one's own logits, and no recompilation."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import attacks
from fulllora_jax.adapters import artefact
from fulllora_jax.attacks import Threat
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.serving import classifier

MIXTURE = ('linf', 'base', 'l2', 'wide', 'linf', 'wide')


@pytest.fixture(scope='module')
def images():
  rng = np.random.default_rng(0)
  return rng.uniform(size=(len(MIXTURE), 8, 8, 1)).astype(np.float32)


def rewrite(workdir, change):
  """Applies change(leaves, metadata) to a run's best adapter."""
  tree, metadata = artefact.read_artefact(workdir / 'best')
  leaves = trees.named_leaves(tree)
  change(leaves, metadata)
  tree = trees.select(leaves, leaves)
  step = metadata['step'] + 1
  artefact.save_artefact(workdir / 'best', step, tree, metadata)


def another(finished, path, change):
  """A copy of the finished run with other leaves."""
  copied = pathlib.Path(shutil.copytree(finished.workdir, path))
  rewrite(copied, change)
  return copied


def noisy(leaves, metadata):
  del metadata
  rng = np.random.default_rng(len(leaves))
  for path, leaf in leaves.items():
    leaves[path] = leaf + rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)


def wider(leaves, metadata):
  """Rank 4 and alpha 3, in place of 2 and 2."""
  metadata['config']['adapter'].update(rank=4, alpha=3.0)
  rng = np.random.default_rng(4)
  for path, leaf in leaves.items():
    if path.endswith('lora_a'):
      leaves[path] = rng.normal(0, 0.3, (len(leaf), 4)).astype(leaf.dtype)
    if path.endswith('lora_b'):
      shape = (4, leaf.shape[1])
      leaves[path] = rng.normal(0, 0.3, shape).astype(leaf.dtype)


@pytest.fixture(scope='module')
def paths(finished, tmp_path_factory):
  folder = tmp_path_factory.mktemp('many')
  return {
    'linf': finished.workdir,
    'l2': another(finished, folder / 'l2', noisy),
    'wide': another(finished, folder / 'wide', wider),
  }


@pytest.fixture(scope='module')
def many(paths):
  return classifier.load(paths)


@pytest.fixture(scope='module')
def alone(paths, images):
  """name -> logits of the adapter that `load` gives by itself."""
  logits = {n: classifier.load(p).logits(images) for n, p in paths.items()}
  logits['base'] = classifier.load(paths['linf']).base_logits(images)
  return {name: np.asarray(each) for name, each in logits.items()}


def refused(words, call):
  with pytest.raises(UserError, match=words) as caught:
    call()
  assert '\n' not in str(caught.value)


def test_one_adapter_for_all_images(many, images, alone):
  assert many.names == ('linf', 'l2', 'wide', 'base')
  for name in many.names:
    logits = many.logits(images, name)
    np.testing.assert_allclose(logits, alone[name], rtol=1e-5, atol=1e-6)
    classes = many.predict(images, name)
    np.testing.assert_array_equal(classes, alone[name].argmax(axis=1))
  differences = [abs(alone[n] - alone['linf']).max() for n in many.names[1:]]
  assert min(differences) > 0.01


def test_of_one_rank_the_logits_are_the_same_bits(paths, images, alone):
  same = classifier.load({name: paths[name] for name in ('linf', 'l2')})
  for name in same.names:
    np.testing.assert_array_equal(same.logits(images, name), alone[name])


def test_an_adapter_for_each_image(many, images, alone):
  expected = np.stack([alone[name][i] for i, name in enumerate(MIXTURE)])
  mixed = many.logits(images, MIXTURE)
  np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(many.predict(images, np.array(MIXTURE)), expected.argmax(axis=1))


def test_no_choice_compiles_anything(many, images):
  many.logits(images, 'linf')
  many.logits(images, MIXTURE)
  compiled = []
  listener = lambda event, *_, **__: compiled.append(event)  # noqa: E731
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    for name in many.names:
      many.logits(images, name)
      many.logits(images, [name, *MIXTURE[1:]])
    assert not compiled
    many.logits(images[:2], 'l2')
    assert compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


def test_an_attack_switches_without_compiling(many, images):
  labels = jnp.arange(len(images))
  threat = Threat(norm='linf', eps=0.1)

  @jax.jit
  def attack(logits_fn):
    keys = jax.random.split(jax.random.key(0), len(images))
    return attacks.pgd(keys, logits_fn, images, labels, threat, steps=2, step_size=0.05)

  found = {name: attack(many.logits_fn(name)) for name in many.names}
  assert attack._cache_size() == 1
  assert np.abs(found['linf'] - found['l2']).max() > 0.01
  together = attack(many.logits_fn(MIXTURE))
  expected = [found[name][i] for i, name in enumerate(MIXTURE)]
  np.testing.assert_allclose(together, np.stack(expected), atol=1e-6)


def evaluate(logits_fn, x, labels, rows, batch_size):
  mesh = mesh_lib.make_mesh(jax.devices()[:1])
  threat, version = Threat('linf', 0.03), ['square-20', 'square-40']
  return attacks.autoattack(
    jax.random.key(0), logits_fn, x[rows], labels[rows], threat, version, batch_size,
    indices=rows, mesh=mesh,
  )  # fmt: skip


def test_names_travel_with_their_images_through_an_ensemble(many):
  batch_size = 5
  x = np.random.default_rng(5).uniform(size=(16, 8, 8, 1)).astype(np.float32)
  names = np.array([('linf', 'l2', 'wide', 'base')[i % 4] for i in range(len(x))])
  labels = np.asarray(many.predict(x, names))
  together = evaluate(many.logits_fn(names), x, labels, np.arange(len(x)), batch_size)
  assert 0 < together.robust.sum() < len(x) and together.cascade.accuracy[0] == 1
  for name in many.names:
    rows = np.flatnonzero(names == name)
    alone = evaluate(many.logits_fn(name), x, labels, rows, batch_size)
    np.testing.assert_array_equal(together.robust[rows], alone.robust)
    np.testing.assert_allclose(together.x_adv[rows], alone.x_adv, atol=1e-6)


@pytest.mark.parametrize('names', [MIXTURE, [*MIXTURE[:3], *MIXTURE[2::-1]]])  # or a palindrome
def test_names_that_stay_behind_are_refused(many, images, names):
  labels = np.asarray(many.predict(images, names))
  rows = np.arange(len(images))
  held = lambda x: many.logits_fn(names)(x)  # noqa: E731
  refused(
    r'logits of an image change by up to .* with its row in the batch.*many.logits_fn\(names\)',
    lambda: evaluate(held, images, labels, rows, len(images)),
  )
  one = lambda x: many.logits_fn('l2')(x)  # noqa: E731
  assert evaluate(one, images, labels, rows, len(images)).robust.shape == (6,)


@pytest.mark.parametrize('count', [2, 12])
def test_another_number_of_names_than_images_is_refused(many, images, count):
  logits_fn = many.logits_fn(['l2', 'linf'] * (count // 2))
  words = r'adapter has \d+ names for 6 images; give one name, or one for each image'
  refused(words, lambda: logits_fn(images))
  refused(words, lambda: jax.jit(logits_fn)(images))
  labels = np.zeros(len(images), int)
  refused(words, lambda: evaluate(logits_fn, images, labels, np.arange(6), 2))
  threat, key = Threat('linf', 0.1), jax.random.key(0)
  refused(
    words, lambda: attacks.pgd(key, logits_fn, images, labels, threat, steps=1, step_size=0.1)
  )


def test_gradients_and_jit_from_outside(many, images):
  def gradient(adapter):
    return jax.jit(jax.grad(lambda x: many.logits(x, adapter)[:, 0].sum()))

  of_one = gradient('l2')(images)
  of_each = gradient(['l2'] * len(images))(images)
  np.testing.assert_allclose(of_one, of_each, rtol=1e-5, atol=1e-5)
  assert np.abs(of_each).max() > 0.01


def test_the_products_of_the_base_stay_whole(many, images):
  # What reads a frozen kernel reads all rows of the batch at once.
  index = np.zeros(len(images), np.int32)
  arguments = (many.stack, many.frozen, index, images)
  text = many._mixed.lower(*arguments).as_text()
  kernel = 'tensor<16x32xf32>'  # of fc1
  products = [
    line for line in text.splitlines() if 'dot_general' in line and kernel in line.split('->')[0]
  ]
  assert products
  assert not [line for line in products if 'batching_dims' in line]


def test_a_batch_over_eight_devices(paths, alone, images):
  many = classifier.load(paths)
  mesh = mesh_lib.make_mesh()
  many.put(mesh)
  names = [*MIXTURE, 'linf', 'linf']
  batch = np.concatenate([images, images[:2]])
  spread = mesh_lib.put_whole_batch({'x': batch}, mesh)['x']
  expected = [alone[name][i % len(images)] for i, name in enumerate(names)]
  mixed = many.logits(spread, names)
  np.testing.assert_allclose(mixed, np.stack(expected), rtol=1e-5, atol=1e-6)
  one = many.logits(spread, 'l2')
  np.testing.assert_allclose(one[:6], alone['l2'], rtol=1e-5, atol=1e-6)
  for logits in (mixed, one):
    assert logits.sharding.is_equivalent_to(mesh_lib.batch_sharded(mesh), 2)
  index = np.zeros(8, np.int32)
  arguments = (many.stack, many.frozen, index, spread)
  text = many._mixed.lower(*arguments).compile().as_text()
  assert not [word for word in ('all-', 'collective') if word in text]


def test_metadata_of_each(many):
  assert many.metadata['wide']['config']['adapter']['rank'] == 4
  assert many.metadata['linf']['threat']['eps'] == '0.1'
  assert many.metadata['base']['threat'] is None
  assert many.metadata['base']['image_shape'] == [8, 8, 1]


def test_the_base_is_in_memory_once(many):
  frozen = {id(leaf) for leaf in jax.tree.leaves(many.frozen)}
  stacked = jax.tree.leaves(many.stack)
  assert all(leaf.shape[0] == 4 for leaf in stacked)
  paths = trees.named_leaves(many.frozen)
  assert not paths.keys() & trees.named_leaves(many.stack).keys()
  assert len(frozen) == len(paths)


@pytest.mark.parametrize(
  'names, words',
  [
    ('linnf', r"unknown adapter 'linnf'; did you mean linf\? known: linf, l2"),
    ('zzz', r"unknown adapter 'zzz'; known: linf, l2, wide, base"),
    (['l2', 'linf'], 'adapter has 2 names for 6 images; give one name, or one'),
    ([*MIXTURE[:5], 'x'], "unknown adapter 'x'"),
  ],
)
def test_a_wrong_adapter_is_refused(many, images, names, words):
  refused(words, lambda: many.logits(images, names))


def test_wrong_images_are_refused(many, images):
  refused(r'values in .*, expected \[0, 1\]', lambda: many.logits(2 - images, 'l2'))
  refused(
    r'expected \[B, H, W, C\]', lambda: jax.jit(many.logits, static_argnums=1)(images[0], 'l2')
  )


@pytest.mark.parametrize(
  'given, words',
  [
    ({}, 'no adapter is named; give {name: path}'),
    ({'base': 'runs/a'}, "'base' stands for the base .*; give runs/a another"),
    ({'': 'runs/a'}, "adapter name '': give each a text"),
    ({1: 'runs/a'}, 'adapter name 1: give each a text'),
    (['runs/a', 'runs/b'], r'a name for each of several, {name: path}; .* list'),
  ],
)
def test_wrong_names_are_refused(given, words):
  refused(words, lambda: classifier.load(given))
