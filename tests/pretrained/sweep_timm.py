"""Compares every ViT, Swin and ConViT of timm with ours, or shows how it is refused.

  pip install torch timm
  python tests/pretrained/sweep_timm.py FILE [PATTERN ...]

Each model is built by timm with two blocks (Swin: in each stage), every parameter of it drawn at
random, and written by timm's own save_for_hf; `pretrained.load` then reads it with nothing but that
folder. Logits of two random images, or where there is no head the features times a random matrix,
are to agree to 1e-4 of the largest. FILE gets a line for each name as soon as it is known, and what
it has is not done again. It takes about an hour on two cores.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import timm
import torch
from golden import make_timm_table

from fulllora_jax import pretrained
from fulllora_jax.core.errors import UserError

CLASSES, BOUND = 7, 1e-4


def main(file, *patterns):
  file = Path(file)
  done = {line.split('\t')[0] for line in file.read_text().splitlines()} if file.exists() else set()
  torch.set_num_threads(1)
  wanted = {n for p in patterns or make_timm_table.NAMES for n in timm.list_models(p)}
  for name in sorted(wanted - done):
    with file.open('a') as out:
      out.write('\t'.join((name, *outcome(name))) + '\n')
  print(summary(file))


def outcome(name):
  """Returns 'right' and the error, 'refused' and the line, or what is wrong."""
  try:
    torch.manual_seed(0)
    model, width = randomised(name)
    with tempfile.TemporaryDirectory() as folder:
      timm.models.save_for_hf(model, folder, safe_serialization=True)
      try:
        return compared(model, folder, width)
      except UserError as error:
        lines = str(error).replace(folder, 'FOLDER').splitlines()
        return ('refused' if len(lines) == 1 else 'WRONG: lines', lines[0])
  except Exception as error:
    return ('CRASHED', repr(error)[:300].replace('\n', ' '))


def randomised(name):
  """Returns timm's model with two blocks and random parameters, and the width of its features."""
  swin = name.startswith('swin')
  own = {'depths': (2, 2, 2, 2)} if swin else {'depth': 2}
  if name.startswith('convit'):
    own['local_up_to_layer'] = 1
  try:
    model = timm.create_model(name, **own)
  except AssertionError:  # which counts the heads of all its blocks
    model = timm.create_model(name, num_kv_heads=4, **own)
  draw = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=draw)
      if parameter.ndim < 2:
        parameter.copy_(float(key.endswith('weight')) + 0.3 * noise)
      elif parameter.ndim == 2 or parameter.ndim == 4:
        parameter.copy_(noise / parameter[0].numel() ** 0.5)
      else:
        parameter.copy_(0.5 * noise)
  return model.eval(), model.num_features


def compared(model, folder, width):
  ours, variables, report = pretrained.load(folder, num_classes=model.num_classes or CLASSES)
  channels, size, _ = model.pretrained_cfg['input_size']
  images = np.random.RandomState(0).uniform(size=(2, size, size, channels)).astype(np.float32)
  mean, std = (np.array(model.pretrained_cfg[key], np.float32) for key in ('mean', 'std'))
  with torch.no_grad():
    given = torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2).copy())
    expected = model(given).numpy()
  if report.new_head:
    matrix = np.random.RandomState(1).standard_normal((width, CLASSES)).astype(np.float32)
    variables['params']['head']['kernel'] = matrix / width**0.5
    expected = expected @ matrix / width**0.5
  # Patches of 14 leave out the last pixels of 384.
  images = images[:, : report.image_size, : report.image_size]
  apply = jax.jit(ours.apply)  # one image at a time: scores of 4096 tokens take a GB
  logits = np.concatenate([np.asarray(apply(variables, image[None])) for image in images])
  jax.clear_caches()
  error = np.abs(logits - expected).max() / np.abs(expected).max()
  right = logits.shape == expected.shape and error < BOUND and np.isfinite(expected).all()
  return ('right' if right else 'WRONG', f'{error:.1e}')


def summary(file):
  """Counts the outcomes, and says what the largest error among the right ones is."""
  rows = [line.split('\t') for line in file.read_text().splitlines()]
  counts = {}
  for _, verdict, *_ in rows:
    counts[verdict] = counts.get(verdict, 0) + 1
  worst = max((float(note) for _, verdict, note in rows if verdict == 'right'), default=0.0)
  return f'{len(rows)} names: {counts}; largest error of those that are right {worst:.1e}'


if __name__ == '__main__':
  main(*sys.argv[1:])
