"""The row of a RobustBench leaderboard, and the adversarial images beside it.

They are as github.com/RobustBench/robustbench has them: model_info/DATASET/THREAT/MODEL.json, and
one `.pt` tensor [N, C, H, W] of the whole test set in the order of its files. As there, what FILE
has already is kept, and what nobody said is null: it is for people to fill in.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulllora_jax import data
from fulllora_jax.adapters.methods import METHODS
from fulllora_jax.attacks import Threat
from fulllora_jax.core import files
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError
from fulllora_jax.data.corruptions import NAMES
from fulllora_jax.evaluation import shifts
from fulllora_jax.evaluation.evaluations import Evaluations
from fulllora_jax.evaluation.finished_run import FinishedRun
from fulllora_jax.evaluation.settings import Plan

_SETS = ('cifar10', 'cifar100', 'imagenet2012')
_WHOLE = 10_000  # test images of CIFAR; ImageNet's leaderboards have 5,000 of their own
_BOARDS = {('cifar10', 'linf'): '8/255', ('cifar10', 'l2'): '0.5'}  # the radius of each
_BOARDS |= {('cifar100', 'linf'): '8/255', ('imagenet2012', 'linf'): '4/255'}
_KEYS = ('link', 'name', 'authors', 'additional_data', 'number_forward_passes', 'dataset', 'venue')
_KEYS += ('architecture', 'eps', 'clean_acc', 'reported')  # that every row has
_OURS = 'fulllora_jax: '  # begins what a footnote has from here


def begin(
  file: str, config, plans: Sequence[Plan], weights: Sequence[str], split: str
) -> dict[str, Any]:
  """Returns what FILE has already; UserError where there is no leaderboard for what is asked."""
  name, size, plan = config.data.name, config.data.image_size, plans[0]
  board = _BOARDS.get((name, plan.norm))
  known = ', '.join(f'{norm} {eps}' for (of, norm), eps in _BOARDS.items() if of == name)
  standard = {'autoattack', 'autoattack-second'} & set(plan.attacks)
  every = bool(plan.corruptions) and shifts.parse(plan.corruptions) == NAMES
  whole = split == 'test' and config.data.test_split in ('', 'test', 'validation')
  path, row, fault = files.absolute_path(file), {}, ''
  try:
    files.make_writable(path.parent)
    row = json.loads(files.read_file(path)) if path.exists() else {}
  except (OSError, ValueError) as error:
    fault = str(error)
  for wrong, told in (
    (name not in _SETS, f'its leaderboards are of {", ".join(_SETS)}, not of {name}'),
    (not whole, 'its leaderboards are of the test set; leave out --split, data.test_split'),
    (name != _SETS[-1] and size != 32, f'{name} has images of 32 pixels, and eps, not of {size}'),
    (len(plans) + len(weights) > 2, 'a row is one model and threat; give one --weights and --eps'),
    (not standard and not every, 'a row has AutoAttack or all corruptions; --attack autoattack'),
    (
      standard and not (board and Threat(plan.norm, board) == plan.threat),
      f'{name} is attacked in {known}, not in {plan.norm} {plan.eps}',
    ),
    (fault or path.suffix != '.json', f'cannot use {path}: {fault or "give a FILE.json"}'),
    (not isinstance(row, dict), f'{path} holds no row; give another FILE.json'),
  ):
    if wrong:
      raise UserError(f'--robustbench: {told}')
  return row


def write(
  file: str, row: dict[str, Any], run: Evaluations, result: Mapping[str, Any], weights: str
) -> None:
  """Writes the row of a result and its adversarial images, and says what people must fill in.

  The row goes on from what `begin` returned. Raises UserError where the saved images are not what
  the result says.
  """
  path, found = files.absolute_path(file), {e['attack']: e for e in result['evaluations']}
  strongest = found.get('autoattack-second') or found.get('autoattack')
  if strongest:
    checked = strongest['verified']
    if checked['mismatches'] or checked['outside']:
      raise UserError(
        f'--robustbench: no row, for of the saved images {checked["mismatches"]} are classified '
        f'otherwise when looked at again, and {checked["outside"]} are outside the ball'
      )
    say(f'\nx_adv: {_write_images(path, run, run.folder / checked["file"])}')
  kept = {key: value for key, value in row.items() if value is not None}
  numbers = _numbers(found, result) | {'dataset': run.config.data.name.removesuffix('2012')}
  said = '; '.join(_footnotes(run.config.data.name, found, result, numbers))
  notes = (kept.pop('footnote', '').partition(_OURS)[0].strip(), said and f'{_OURS}{said}.')
  row = dict.fromkeys(_KEYS) | _known(run, weights) | kept | numbers
  row |= {'footnote': ' '.join(filter(None, notes)) or None}
  files.replace_file(path, f'{json.dumps(row, indent=2)}\n'.encode())
  empty = [key for key in _KEYS if row[key] is None and (key != 'eps' or strongest)]
  say(f'row: {path}; to fill in: {", ".join(empty) or "nothing"}')


def _numbers(found: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
  """Returns the measured numbers; accuracies are in % with two decimals."""
  numbers, standard = {}, found.get('autoattack')
  second = found.get('autoattack-second')
  if first := standard or found.get('clean'):
    right = sum(each['clean'] for each in first['per_class'])
    numbers['clean_acc'] = _percent(right / first['num_examples'])
  if standard:
    numbers |= {'eps': standard['eps'], 'autoattack_acc': _percent(standard['accuracy'])}
  if second and second['accuracy'] < standard['accuracy']:
    numbers['external'] = _percent(second['accuracy'])
  for each in result.get('corruptions', ()):
    numbers['corruptions_acc'] = _percent(each['mean'])
    if each['mce'] is not None:
      numbers['corruptions_mce'] = _percent(each['mce'])
  return numbers


def _footnotes(
  name: str, found: Mapping[str, Any], result: Mapping[str, Any], numbers: Mapping[str, str]
) -> Iterator[str]:
  """Yields what else there is to say of the numbers: where they are not quite the leaderboard's."""
  corrupted = next(iter(result.get('corruptions', ())), None)
  first = found.get('autoattack') or corrupted
  assert first is not None  # by `begin`
  count, dtype, products = (first[k] for k in ('num_examples', 'dtype', 'matmul_precision'))
  if name == _SETS[-1]:
    yield f'on {count} validation images, not the 5000 of the leaderboard'
  elif count < _WHOLE:
    yield f'on {count} of {_WHOLE} test images, chosen by a seed'
  if (dtype, products) != ('float32', 'highest'):
    yield f'computed in {dtype}, matmul precision {products}'
  if corrupted and corrupted['source'].startswith('made'):
    yield 'the corruptions are made from the test images, not published ones'
  yield from first.get('notes', ())
  if 'external' in numbers:
    yield f'{numbers["external"]}% robust accuracy is given by PMA and MALT after AutoAttack'


def _known(run: Evaluations, weights: str) -> dict[str, Any]:
  """Returns what is known of a run of ours; of a model of the user's nothing is."""
  if not isinstance(run, FinishedRun):
    return {}
  config, more = run.config, None
  if run.load('best').metadata.get('base_source'):  # a published checkpoint saw other images
    more = True if config.data.name != _SETS[-1] else None
  elif config.base.source == 'train':
    more = False
  method = f', {METHODS[config.method].title}' if weights != 'base' else ''
  architecture = f'{config.model.name}/{config.model.patch_size}{method}'
  return {'additional_data': more, 'number_forward_passes': 1, 'architecture': architecture}


def _write_images(path: Path, run: Evaluations, saved: Path) -> Path:
  """Writes x_adv, float32 [N, C, H, W]; .npz with indices where it cannot be the tensor."""
  with files.load_arrays(saved) as read:
    arrays = {name: read[name] for name in ('x_adv', 'indices', 'labels', 'robust')}
  arrays['x_adv'] = np.ascontiguousarray(arrays['x_adv'].transpose(0, 3, 1, 2))
  order = data.published_order(run.config.data)
  try:
    import torch
  except ImportError:
    torch = None
  if torch is None or order is None or len(order) != len(arrays['x_adv']):
    say('x_adv is an .npz with indices: a .pt needs PyTorch, all images and their published order')
    files.replace_arrays(path.with_suffix('.npz'), **arrays)
    return path.with_suffix('.npz')
  content, rows = io.BytesIO(), np.argsort(arrays['indices'])[order]
  torch.save(torch.from_numpy(arrays['x_adv'][rows]), content)
  files.replace_file(path.with_suffix('.pt'), content.getvalue())
  return path.with_suffix('.pt')


def _percent(share: float) -> str:
  return f'{100 * share:.2f}'
