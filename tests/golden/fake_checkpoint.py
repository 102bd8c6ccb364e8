"""Made-up weights under the real names of published checkpoints.

An array follows from its key and shape alone, so that a golden file needs the
keys, the shapes and the logits, and neither weights nor PyTorch.
"""

import json
import pathlib
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / 'pretrained'


def weights(shapes):
  """Returns an array for each key: floats.

  Args:
    shapes: key -> list of ints.
  """
  return {key: array(key, tuple(shape)) for key, shape in shapes.items()}


def array(key, shape):
  """Returns a PyTorch-shaped array for one key, of a trained model's size."""
  draw = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
  if len(shape) < 2:
    centre = 1.0 if key.endswith(('.weight', '/scale')) else 0.0
    return np.asarray(centre + 0.1 * draw, np.float32)
  return (draw / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def images(size, channels=3, count=2):
  """Returns images float32 [count, size, size, channels] in [0, 1]."""
  shape = (count, size, size, channels)
  return np.random.RandomState(0).uniform(size=shape).astype(np.float32)


def write(case, shapes, config, image_size, logits, made_by):
  """Writes a golden case as JSON."""
  values = {
    'made_by': made_by,
    'config': config,
    'image_size': image_size,
    'shapes': {key: list(shape) for key, shape in shapes.items()},
    'logits': np.asarray(logits, np.float64).round(7).tolist(),
  }
  lines = [f'{json.dumps(k)}: {json.dumps(v)}' for k, v in values.items()]
  text = '{\n' + ',\n'.join(lines) + '\n}\n'  # a line for each field
  FOLDER.mkdir(exist_ok=True)
  (FOLDER / f'{case}.json').write_text(text)


def read(case):
  """Returns a case: config, image_size, shapes, logits."""
  return json.loads((FOLDER / f'{case}.json').read_text())


def cases(prefix=''):
  """Returns the names of the cases there are."""
  return sorted(path.stem for path in FOLDER.glob(f'{prefix}*.json'))
