"""evaluate --robustbench: the leaderboard's row, and images that --verify takes again."""

import json
import sys
import types

import numpy as np
import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.core.errors import UserError
from fulllora_jax.data import opening, records, tfds_source
from fulllora_jax.evaluation import robustbench
from fulllora_jax.evaluation.finished_run import FinishedRun

COUNT = 12
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(0, 1, (3072, 10)).astype(np.float32)
IMAGES = RNG.integers(0, 256, (COUNT, 32, 32, 3), np.uint8)
LABELS = (IMAGES.reshape(COUNT, -1) / 255 @ WEIGHTS).argmax(axis=1).astype(np.int32)
LABELS[0] = (LABELS[0] + 1) % 10
ORDER = RNG.permutation(COUNT)
ASKED = ('--logits=linear_cifar:logits', '--data=cifar10', '--image_size=32', '--seed=1')


@pytest.fixture
def cifar10(monkeypatch):
  """A set called cifar10 of 12 test images, whose published order is another."""

  def source(data):
    def read(indices, with_images):
      return IMAGES[indices] if with_images else None, LABELS[indices]

    def part(name):
      return records.Records(name, COUNT, read)

    names = tuple(map(str, range(10)))
    return records.Source('cifar10', (32, 32, 3), names, part('train'), part('test'))

  stand_in = types.SimpleNamespace(open_tfds=source, published_order=lambda data: ORDER)
  monkeypatch.setattr(opening, '_tfds_source', lambda data: stand_in)
  monkeypatch.setattr(robustbench, '_WHOLE', COUNT)
  linear = types.ModuleType('linear_cifar')
  linear.logits = lambda images: images.reshape(len(images), -1) @ WEIGHTS
  monkeypatch.setitem(sys.modules, 'linear_cifar', linear)


def test_a_row_and_images_that_are_verified_again(cifar10, evaluate, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(robustbench, '_BOARDS', {('cifar10', 'linf'): '1/200'})
  where = (*ASKED, f'--workdir={tmp_path}/run', '--eps=0.005')
  file = tmp_path / 'rows' / 'Linear2026.json'
  file.parent.mkdir()
  mine = {
    'name': 'A linear model',
    'footnote': 'Mine. fulllora_jax: on 3 images.',
    'clean_acc': '1',
  }
  file.write_text(json.dumps(mine | {'venue': None, 'more': 'kept'}))
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, 'torch', None)
    result = evaluate(*where, '--attack=autoattack', f'--robustbench={file}')
  said, (record,) = capsys.readouterr().err, result['evaluations']
  row = json.loads(file.read_text())
  right = record['num_correct']
  assert 0 < right < COUNT - 1
  assert row == {
    'link': None, 'name': 'A linear model', 'authors': None, 'additional_data': None,
    'number_forward_passes': None, 'dataset': 'cifar10', 'venue': None, 'architecture': None,
    'eps': '0.005', 'clean_acc': f'{100 * (COUNT - 1) / COUNT:.2f}', 'reported': None,
    'more': 'kept', 'autoattack_acc': f'{100 * right / COUNT:.2f}', 'footnote': 'Mine.',
  }  # fmt: skip
  assert list(row)[:3] == ['link', 'name', 'authors']
  assert 'to fill in: link, authors, additional_data, number_forward_passes, venue' in said
  assert f'x_adv: {tmp_path}/rows/Linear2026.npz' in said

  def verified(path):
    (found,) = evaluate(*where, f'--verify={path}')['verified']
    assert (found['num_correct'], found['num_examples'], found['outside']) == (right, COUNT, 0)
    return found

  handed = np.load(file.with_suffix('.npz'))
  assert handed['x_adv'].shape == (COUNT, 3, 32, 32) and handed['x_adv'].dtype == np.float32
  found = verified(file.with_suffix('.npz'))
  assert (found['agree'], found['assumed']) == (COUNT, '')

  torch = pytest.importorskip('torch', reason='PyTorch is not installed')
  saved = tmp_path / 'run' / 'evaluations' / record['verified']['file']
  run = types.SimpleNamespace(config=config_lib.default())
  path = robustbench._write_images(file, run, saved)
  tensor = torch.load(path, weights_only=True)
  published = IMAGES[ORDER].transpose(0, 3, 1, 2) / 255
  assert path == file.with_suffix('.pt') and tensor.dtype == torch.float32
  assert np.abs(tensor.numpy() - published).max() <= 0.005 + 1e-6
  found = verified(path)
  assert found['assumed'].endswith('in the order in which they were published')


def plan(**changes):
  given = {'norm': 'linf', 'eps': '8/255', 'attacks': ('autoattack',), 'corruptions': ''}
  return robustbench.Plan(**(given | changes))


def begun(file, plans=None, weights=('best',), split='test', **fields):
  config = config_lib.default()
  config.data.update({'name': 'cifar10', 'image_size': 32} | fields)
  return robustbench.begin(str(file), config, plans or [plan()], weights, split)


REFUSED = {
  'set': (
    {'name': 'digits'},
    'its leaderboards are of cifar10, cifar100, imagenet2012, not of dig',
  ),
  'split': ({'split': 'validation'}, 'its leaderboards are of the test set; leave out --split'),
  'part': ({'test_split': 'train[:9%]'}, 'its leaderboards are of the test set'),
  'size': ({'image_size': 224}, 'cifar10 has images of 32 pixels, and eps, not of 224'),
  'weights': ({'weights': ('base', 'best')}, 'a row is one model and threat; give one --weights'),
  'radii': ({'plans': [plan(), plan(eps='4/255')]}, 'give one --weights and --eps'),
  'attack': ({'plans': [plan(attacks=('pgd-20',))]}, 'a row has AutoAttack or all corruptions'),
  'some': ({'plans': [plan(attacks=(), corruptions='fog')]}, 'a row has AutoAttack or all corrup'),
  'eps': (
    {'plans': [plan(eps='0.03')]},
    'cifar10 is attacked in linf 8/255, l2 0.5, not in linf 0',
  ),
  'norm': ({'plans': [plan(norm='l1', eps='12')]}, 'linf 8/255, l2 0.5, not in l1 12'),
  'board': (
    {'name': 'cifar100', 'plans': [plan(norm='l2', eps='0.5')]},
    'cifar100 is attacked in linf 8/255, not in l2 0.5',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_no_leaderboard_has_is_refused(tmp_path, case):
  arguments, words = REFUSED[case]
  with pytest.raises(UserError, match=f'^--robustbench: .*{words}'):
    begun(tmp_path / 'row.json', **arguments)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('name', 'content', 'words'),
  [
    ('row.json', '{"link"', 'cannot use .*row.json: '),
    ('row.json', '[1]', 'row.json holds no row; give another FILE.json'),
    ('row.txt', '{}', 'cannot use .*row.txt: give a FILE.json'),
  ],
)
def test_a_file_that_is_no_row_is_refused(tmp_path, name, content, words):
  (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=f'^--robustbench: .*{words}'):
    begun(tmp_path / name)
  with pytest.raises(UserError, match='^--robustbench: cannot use /proc/no/row.json'):
    begun('/proc/no/row.json')


def test_what_there_are_leaderboards_for():
  for name, norm, eps in (
    ('cifar10', 'linf', '0.03137254901960784'), ('cifar10', 'l2', '0.5'),
    ('cifar100', 'linf', '8/255'), ('imagenet2012', 'linf', '4/255'),
  ):  # fmt: skip
    assert begun('row.json', [plan(norm=norm, eps=eps)], name=name) == {}
  assert begun('row.json', [plan(attacks=('clean',), eps='0', corruptions='all')]) == {}


def record(attack, right, **more):
  counts = {'num_examples': 200, 'num_correct': right, 'accuracy': right / 200}
  computed = {'dtype': 'float32', 'matmul_precision': 'highest', 'eps': '8/255', 'notes': []}
  classes = [{'clean': 150}, {'clean': 21}]
  return {'attack': attack, 'per_class': classes} | counts | computed | more


def row_of(result, name='cifar10'):
  found = {e['attack']: e for e in result['evaluations']}
  numbers = robustbench._numbers(found, result)
  return numbers, list(robustbench._footnotes(name, found, result, numbers))


def test_a_second_opinion_is_external():
  first = record('autoattack', 91, notes=['fab: 3 images had ...'], dtype='bfloat16')
  numbers, notes = row_of({'evaluations': [first, record('autoattack-second', 90)]})
  expected = {'clean_acc': '85.50', 'eps': '8/255', 'autoattack_acc': '45.50', 'external': '45.00'}
  assert numbers == expected
  assert notes == [
    'on 200 of 10000 test images, chosen by a seed',
    'computed in bfloat16, matmul precision highest',
    'fab: 3 images had ...',
    '45.00% robust accuracy is given by PMA and MALT after AutoAttack',
  ]
  numbers, _ = row_of({'evaluations': [first, record('autoattack-second', 91)]})
  assert 'external' not in numbers


def test_corruptions_are_in_the_row():
  measured = record('', 0) | {'mean': 0.7654, 'mce': 0.61, 'source': 'imagenet2012_corrupted'}
  result = {'evaluations': [record('clean', 171)], 'corruptions': [measured]}
  numbers, notes = row_of(result, 'imagenet2012')
  expected = {'clean_acc': '85.50', 'corruptions_acc': '76.54', 'corruptions_mce': '61.00'}
  assert numbers == expected
  assert notes == ['on 200 validation images, not the 5000 of the leaderboard']
  measured |= {'mce': None, 'source': 'made from cifar10, seed 0', 'num_examples': 10_000}
  numbers, notes = row_of(result)
  assert 'corruptions_mce' not in numbers
  assert notes == ['the corruptions are made from the test images, not published ones']


@pytest.mark.parametrize(
  ('data', 'published', 'source', 'more'),
  [
    ('cifar10', {'source': 'hf:x'}, 'hf:x', True),
    ('imagenet2012', {'source': 'hf:x'}, 'hf:x', None),
    ('cifar10', None, 'train', False),
    ('cifar10', None, '/some/run', None),
  ],
)
def test_what_is_known_of_a_run(data, published, source, more):
  run = object.__new__(FinishedRun)
  run.config = config_lib.default()
  run.config.data.name, run.config.base.source = data, source
  run.config.model.update(name='vit_b', patch_size=4)
  run.load = lambda which: types.SimpleNamespace(metadata={'base_source': published})
  assert robustbench._known(run, 'best') == {
    'additional_data': more,
    'number_forward_passes': 1,
    'architecture': 'vit_b/4, FullLoRA adversarial finetuning',
  }
  assert robustbench._known(run, 'base')['architecture'] == 'vit_b/4'


@pytest.mark.parametrize(
  'damage', [{'mismatches': 2, 'outside': 0}, {'mismatches': 0, 'outside': 1}]
)
def test_images_that_are_not_what_was_said_give_no_row(tmp_path, damage):
  result = {'evaluations': [record('autoattack', 90, verified=damage | {'file': 'x.npz'})]}
  with pytest.raises(UserError, match='^--robustbench: no row, for of the saved images'):
    robustbench.write(str(tmp_path / 'row.json'), {}, None, result, 'best')
  assert not list(tmp_path.iterdir())


def test_the_published_order_is_in_the_names_of_tfds(monkeypatch, digits_data):
  assert tfds_source.published_order(digits_data) is None  # of another set
  ids = [b'test_00002', b'test_00000', b'test_00001']

  class Builder:
    info = types.SimpleNamespace(features={'id': None})

    def as_data_source(self, split, decoders):
      return Source(ids)

  class Source(list):
    def __getitems__(self, rows):
      return [{'id': self[row]} for row in rows]

  monkeypatch.setattr(tfds_source, '_opened', lambda data: (Builder(), 'image', 'label'))
  monkeypatch.setattr(tfds_source, '_test_split', lambda *_: 'test')
  np.testing.assert_array_equal(tfds_source.published_order(digits_data), [1, 2, 0])
  ids[1] = b'test_frog_0037'  # prepared from elsewhere
  assert tfds_source.published_order(digits_data) is None
