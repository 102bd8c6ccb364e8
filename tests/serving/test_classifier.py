"""Loading an adapter: whole, onto its own base, or an error with the path."""

import copy
import pickle
import shutil

import numpy as np
import pytest

from fulllora_jax import pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.serving import classifier
from fulllora_jax.training import loop

A = 'lnlora/embedding/lora_a'
KERNEL = 'params/embedding/kernel'
BLOCK = 'Transformer/encoderblock_0'
VALUE = f'{BLOCK}/MultiHeadDotProductAttention_1/value'


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope='module')
def loaded(finished):
  return classifier.load(finished.workdir)


def rewrite(directory, change):
  """Applies change(leaves, metadata) to an artefact."""
  tree, metadata = artefact.read_artefact(directory)
  leaves = trees.named_leaves(tree)
  change(leaves, metadata)
  tree = trees.select(leaves, leaves)
  artefact.save_artefact(directory, metadata['step'] + 1, tree, metadata)


def refused(words, *args, **kwargs):
  with pytest.raises(UserError, match=words) as caught:
    classifier.load(*args, **kwargs)
  assert '\n' not in str(caught.value)


def test_metadata_says_what_a_user_needs(loaded, digits, finished):
  metadata = loaded.metadata
  assert metadata['image_shape'] == [8, 8, 1]
  assert metadata['num_classes'] == 10
  assert metadata['label_names'] == list(digits.label_names)
  assert metadata['threat'] == {'norm': 'linf', 'eps': '0.1', 'eps_value': 0.1}
  assert metadata['normalisation'] == {'mean': [0.3], 'std': [0.38]}
  assert len(metadata['base_fingerprint']) == 64
  assert metadata['validation']['attack'] == 'pgd-2'
  assert metadata['validation']['step'] == metadata['step']
  assert metadata['versions']['jax']
  assert metadata['config']['adapter']['rank'] == 2
  assert str(finished.workdir) not in str(metadata['base'])


def test_logits_and_predictions(loaded, images):
  logits = np.asarray(loaded.logits(images))
  assert logits.shape == (5, 10)
  assert logits.dtype == np.float32
  np.testing.assert_array_equal(loaded.predict(images), logits.argmax(axis=1))


def test_base_logits_are_those_of_the_base_run(loaded, images, finished):
  base = classifier.load(finished.workdir / 'base')
  np.testing.assert_array_equal(loaded.base_logits(images), base.logits(images))
  difference = np.abs(loaded.base_logits(images) - loaded.logits(images))
  assert difference.max() > 0.01


def test_a_base_is_its_own_base(images, finished):
  base = classifier.load(finished.workdir / 'base')
  np.testing.assert_array_equal(base.base_logits(images), base.logits(images))


def test_best_last_and_their_paths(finished, images):
  for which in ('best', 'last'):
    one = classifier.load(finished.workdir, which=which)
    other = classifier.load(finished.workdir / which)
    assert one.metadata == other.metadata
    np.testing.assert_array_equal(one.logits(images), other.logits(images))
  assert classifier.load(finished.workdir, which='last').metadata['step'] == 12


def test_which_weights_is_one_of_two(tmp_path):
  with pytest.raises(
    UserError, match="which: unknown 'lats'; known: best, last; did you mean last"
  ):
    classifier.load(tmp_path, which='lats')


def test_a_copied_run_loads_onto_the_base_copied_with_it(finished_copy, loaded, images):
  # The copy's own base is read: with that one gone, it does not load.
  np.testing.assert_array_equal(
    classifier.load(finished_copy).logits(images), loaded.logits(images)
  )
  shutil.rmtree(finished_copy / 'base')
  refused(r'needs its base: .*copied/base.*base=\.\.\.', finished_copy)


def test_the_base_may_lie_elsewhere(finished_copy, tmp_path, loaded, images):
  (finished_copy / 'base').rename(tmp_path / 'moved')
  for base in (tmp_path / 'moved', tmp_path / 'moved' / 'best'):
    np.testing.assert_array_equal(
      classifier.load(finished_copy, base=base).logits(images), loaded.logits(images)
    )


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda leaves, _: leaves.pop(A), f'{A} is missing'),
    (
      lambda leaves, _: leaves.update({'lnlora/more/lora_a': np.ones(2)}),
      'lnlora/more/lora_a is not expected',
    ),
    (
      lambda leaves, _: leaves.update({A: np.ones((4, 3), np.float32)}),
      rf'{A} has shape \(4, 3\), expected \(4, 2\)',
    ),
    (
      lambda leaves, _: leaves.update({A: leaves[A].astype(np.float16)}),
      f'{A} has dtype float16, expected float32',
    ),
    (
      lambda leaves, _: leaves.update({KERNEL: np.ones((2, 2, 1, 16))}),
      f'{KERNEL} is not expected',
    ),
    (
      lambda _, metadata: metadata['config']['adapter'].update(rank=1),
      r'has shape .*, expected .*another rank',
    ),
    (
      lambda _, metadata: metadata['config']['model'].update(depth=2),
      'encoderblock_1/.* is missing',
    ),
    (
      lambda _, metadata: metadata['config'].update(new_field=1),
      'unknown field new_field.*another version',
    ),
  ],
  ids=[
    'missing leaf', 'extra leaf', 'shape', 'dtype', 'a base leaf', 'rank',
    'model', 'version',
  ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(finished_copy, change, words):
  rewrite(finished_copy / 'best', change)
  refused(words, finished_copy)


def add_one_bit(leaves, _):
  changed = leaves[KERNEL].copy()
  changed[0, 0, 0, 0] = np.nextafter(changed[0, 0, 0, 0], np.float32(1))
  leaves[KERNEL] = changed


def test_another_base_is_refused(finished_copy):
  rewrite(finished_copy / 'base' / 'best', add_one_bit)
  refused('another base than .* fingerprint [0-9a-f]{12}', finished_copy)


def test_a_base_with_another_head_will_do(finished_copy, loaded, images):
  # The head is trained: it comes with the adapter.
  rewrite(
    finished_copy / 'base' / 'best',
    lambda leaves, _: leaves.update({'params/head/bias': leaves['params/head/bias'] + 1}),
  )
  np.testing.assert_array_equal(
    classifier.load(finished_copy).logits(images), loaded.logits(images)
  )


@pytest.mark.parametrize(
  'change, words',
  [
    (
      lambda leaves, _: leaves.update({KERNEL: np.ones((4, 4, 1, 16), np.float32)}),
      rf'is not the base of .*: {KERNEL} has shape \(4, 4, 1, 16\)',
    ),
    (lambda leaves, _: leaves.pop(KERNEL), f'{KERNEL} is missing'),
  ],
  ids=['shape', 'missing leaf'],
)
def test_a_base_that_does_not_fit_is_refused(finished_copy, change, words):
  rewrite(finished_copy / 'base' / 'best', change)
  refused(words, finished_copy)


def test_an_adapter_is_no_base(finished):
  best = finished.workdir / 'best'
  refused('needs its base: .* is an adapter', finished.workdir, base=best)


def test_no_run_there(tmp_path):
  refused('holds no best/ of a finished run', tmp_path)


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda x: (x * 255).astype(np.uint8), 'dtype uint8, .*divide'),
    (lambda x: x.astype(np.float64), 'dtype float64, expected float32'),
    (lambda x: x.tolist(), 'dtype list, expected float32'),
    (lambda x: x[0], r'shape \(8, 8, 1\), expected \[B, H, W, C\]'),
    (lambda x: x[:, :4], r'shape \(5, 4, 8, 1\), .* \[8, 8, 1\]'),
    (lambda x: np.repeat(x, 3, axis=3), r'shape \(5, 8, 8, 3\)'),
    (lambda x: x * 255, r'values in \[.*, 25.*\], expected \[0, 1\]'),
    (lambda x: x - 0.5, r'values in \[-0.*normalisation belongs into the model'),
    (lambda x: np.where(x > 0.5, np.nan, x), r'\[nan, nan\], expected'),
  ],
  ids=[
    'uint8', 'float64', 'list', 'one image', 'size', 'channels', '0..255',
    'normalised', 'nan',
  ],
)  # fmt: skip
def test_images_of_another_kind_are_refused(loaded, images, change, words):
  for use in (loaded.logits, loaded.predict, loaded.base_logits):
    with pytest.raises(UserError, match=words):
      use(change(images))


@pytest.mark.parametrize(
  'method, head, trained, frozen',
  [
    ('lora', 'train', f'lnlora/{VALUE}/lora_a', 'lnlora/embedding/lora_a'),
    ('adapter', 'frozen', f'lnlora/{BLOCK}/MlpBlock_3/Dense_1/up', KERNEL),
    ('vpt', 'train', f'lnlora/{BLOCK}/prompts', KERNEL),
    ('bias', 'train', 'params/embedding/bias', KERNEL),
    ('fulllora', 'lnlora', 'lnlora/head/lora_a', 'params/head/bias'),
    ('linear', 'train', 'params/head/bias', KERNEL),
    ('full', 'train', KERNEL, 'lnlora/embedding/lora_a'),
  ],
)
def test_every_method_trains_and_loads(
  small_config, finished, digits, tmp_path, images, one_device,
  method, head, trained, frozen,
):  # fmt: skip
  small_config.method, small_config.adapter.head = method, head
  small_config.train.steps = 1
  small_config.eval.validation_attack = 'clean'
  base = finished.workdir / 'base'
  loop.Training(small_config, tmp_path, digits, pretrained.find_artefact(base)).run()
  loaded = classifier.load(tmp_path)
  assert trained in loaded.metadata['leaves']
  assert frozen not in loaded.metadata['leaves']
  assert loaded.metadata['method'] == method
  np.testing.assert_array_equal(loaded.base_logits(images), classifier.load(base).logits(images))
  assert np.abs(loaded.logits(images) - loaded.base_logits(images)).max() > 0
  with pytest.raises(UserError, match='another base'):
    wrong = shutil.copytree(base, tmp_path / 'wrong')
    rewrite(wrong / 'best', add_one_bit)
    classifier.load(tmp_path, base=wrong)


@pytest.mark.parametrize('again', [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_a_classifier_goes_through_pickle(write_run, tiny_config, tmp_path, images, again):
  write_run(tmp_path, tiny_config())
  x = np.repeat(images, 3, axis=-1)
  one = classifier.load(tmp_path)
  other = again(one)
  np.testing.assert_array_equal(one.logits(x), other.logits(x))
  np.testing.assert_array_equal(one.base_logits(x), other.base_logits(x))
  assert other.metadata == one.metadata
  many = classifier.load({'a': tmp_path})
  np.testing.assert_array_equal(many.logits(x, 'a'), again(many).logits(x, 'a'))
