"""Checking adversarial images that somebody saved: ball, box, labels, and a model's answers.

They may be of this model, which checks a claim, or of another, which measures transfer.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fulllora_jax import data
from fulllora_jax.attacks import Threat
from fulllora_jax.attacks.progress import DAMAGED
from fulllora_jax.core.errors import UserError, first_line
from fulllora_jax.core.files import load_arrays, read_file
from fulllora_jax.core.statistics import share
from fulllora_jax.evaluation.evaluations import Evaluations, outside
from fulllora_jax.evaluation.rounding import rounded_to


class Saved(NamedTuple):
  """Adversarial images of a file, and the images that they were made from."""

  file: str  # its name
  digest: str  # the SHA-256 of its bytes
  x_adv: np.ndarray  # float32 [N, H, W, C]
  x: np.ndarray  # float32 [N, H, W, C] in [0, 1]
  labels: np.ndarray  # int [N], those of the data
  robust: np.ndarray | None  # bool [N], what the file itself says of them
  assumed: str  # what the file does not say and is taken for granted; '' where it says all


def read(
  path: Path, examples: data.Split, order: Callable[[], np.ndarray | None] = lambda: None
) -> Saved:
  """Reads an .npz with `x_adv`, or a .pt with one tensor, as RobustBench takes it.

  An .npz may also have `indices` (the images' places in the split), `labels` and `robust`, as the
  files of `evaluations/` do. Images are [N, H, W, C], or [N, C, H, W] as PyTorch has them.

  Args:
    path: the file.
    examples: the split that the images are of.
    order: returns the places of its images in their publisher's order, int [N], or None. Images
      without indices are in that order, which is everybody's.

  Raises:
    UserError: it cannot be read, or does not fit the split.
  """
  arrays = _tensor(path) if path.suffix in ('.pt', '.pth') else _arrays(path)
  x_adv = arrays['x_adv']
  asked, shape = f'--verify: {path}', examples.fetch(np.arange(1)).shape[1:]
  if x_adv.ndim == 4 and x_adv.shape[1:] != shape and x_adv.shape[1:] == (shape[2], *shape[:2]):
    x_adv = x_adv.transpose(0, 2, 3, 1)
  if x_adv.ndim != 4 or x_adv.shape[1:] != shape or not len(x_adv):
    raise UserError(
      f'{asked}: x_adv has the shape {list(x_adv.shape)}, but images of the data are {list(shape)}'
    )
  if x_adv.dtype not in (np.float16, np.float32, np.float64):
    raise UserError(f'{asked}: x_adv is {x_adv.dtype}, but must be floats in [0, 1]')
  indices, assumed = _places(asked, arrays.get('indices'), len(x_adv), len(examples), order)
  labels, robust = examples.labels[indices], arrays.get('robust')
  if (own := arrays.get('labels')) is not None and not np.array_equal(own, labels):
    wrong = int((own != labels).sum()) if own.shape == labels.shape else len(labels)
    raise UserError(
      f'{asked}: {wrong} of its {len(labels)} labels are not those of the data; it is of another '
      'order, another split or another set'
    )
  if robust is not None and (robust.shape != labels.shape or robust.dtype != bool):
    raise UserError(f'{asked}: its robust is not a yes or no for each of {len(labels)} images')
  x = examples.fetch(indices).astype(np.float32) / 255
  digest, x_adv = hashlib.sha256(read_file(path)).hexdigest(), x_adv.astype(np.float32)
  return Saved(path.name, digest, x_adv, x, labels, robust, assumed)


def _places(
  asked: str, indices: np.ndarray | None, count: int, total: int, order: Callable
) -> tuple[np.ndarray, str]:
  """Returns of which of the `total` images a file's `count` are, and what of that is assumed."""
  if indices is None:
    if count > total:
      raise UserError(f'{asked}: it has {count} images, but the split has {total}')
    if (known := order()) is not None and len(known) == total:
      return known[:count], f'the first {count} images, in the order in which they were published'
    return np.arange(count), f'the first {count} images, in the order of the data'
  if (
    indices.shape != (count,)
    or indices.dtype.kind not in 'iu'
    or indices.min() < 0
    or indices.max() >= total
    or len(np.unique(indices)) < count
  ):
    raise UserError(f'{asked}: its indices are not {count} different places of the {total} images')
  return indices, ''


def _arrays(path: Path) -> dict[str, np.ndarray]:
  try:
    with load_arrays(path) as saved:
      names = [name for name in ('x_adv', 'indices', 'labels', 'robust') if name in saved]
      arrays = {name: saved[name] for name in names}
  except (OSError, AttributeError, *DAMAGED) as error:
    raise UserError(
      f'--verify: cannot read {path}: {first_line(error)}; give an .npz with x_adv, or a .pt'
    ) from None
  if 'x_adv' not in arrays:
    raise UserError(f'--verify: {path} has no x_adv; it is to hold the adversarial images')
  return arrays


def _tensor(path: Path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError:
    raise UserError(
      f'--verify: reading {path} needs PyTorch; pip install torch, or save x_adv as an .npz'
    ) from None
  try:
    found = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # what a damaged file raises is torch's to choose
    raise UserError(f'--verify: cannot read {path}: {first_line(error)}') from None
  if not isinstance(found, torch.Tensor):
    raise UserError(f'--verify: {path} holds a {type(found).__name__}; it is to hold one tensor')
  return {'x_adv': found.numpy()}


def check(
  run: Evaluations, weights: str, split: str, saved: Saved, threat: Threat
) -> dict[str, Any]:
  """Returns what one set of weights makes of saved images, as JSON values.

  An image outside the ball or the box, or that is no number, is no attack: the image that it was
  made from is classified in its place, and so is it beside every attack.
  """
  _, variables = run.variables(weights)
  known = np.isfinite(saved.x_adv).reshape(len(saved.x), -1).all(axis=1)
  no_attack = ~known | outside(
    threat, saved.x, np.where(known[:, None, None, None], saved.x_adv, 0)
  )
  used = np.where(no_attack[:, None, None, None], saved.x, saved.x_adv)
  clean = run.evaluator.predict(variables, saved.x) == saved.labels
  attacked = run.evaluator.predict(variables, used) == saved.labels
  right = int((clean & attacked).sum())
  agree = None if saved.robust is None else int((saved.robust == (clean & attacked)).sum())
  return {
    'weights': weights,
    'split': split,
    'file': saved.file,
    'sha256': saved.digest,
    'norm': threat.norm,
    'eps': threat.eps,
    **share(right, len(saved.x)),
    'clean': int(clean.sum()),
    'outside': int((no_attack & known).sum()),
    'no_number': int((~known).sum()),
    'agree': agree,
    'rounded': rounded_to(used[~no_attack]),
    'assumed': saved.assumed,
  }
