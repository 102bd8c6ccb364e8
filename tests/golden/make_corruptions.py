"""Makes corruptions.npz from the scripts in which CIFAR-10-C and ImageNet-C were made.

  python tests/golden/make_corruptions.py SCRIPTS LIBRARY

SCRIPTS holds make_cifar_c.py and make_imagenet_c.py of hendrycks/robustness, LIBRARY the package
imagecorruptions-imaug, which has the photographs of frost and, without ImageMagick, the motion
blur. Both need OpenCV, scikit-image and numba. All draw from one generator, as ours do.
"""

import importlib
import os
import pathlib
import re
import sys
import zlib
from unittest import mock

import numpy as np
from PIL import Image

NAMES = [
  'gaussian_noise',
  'shot_noise',
  'impulse_noise',
  'defocus_blur',
  'glass_blur',
  'motion_blur',
  'zoom_blur',
  'snow',
  'frost',
  'fog',
  'brightness',
  'contrast',
  'elastic_transform',
  'pixelate',
  'jpeg_compression',
]
SEVERITIES = 1, 3, 5
FILES = {32: 'make_cifar_c.py', 224: 'make_imagenet_c.py'}


def image(side: int) -> np.ndarray:
  """Returns an image of slopes and squares, uint8 [side, side, 3]."""
  rows, columns, channels = np.indices((side, side, 3))
  slope = (rows * (channels + 1) + columns * (3 - channels)) * 40 // side
  squares = (rows * 8 // side + columns * 8 // side) % 2
  return (slope + 70 * squares + 15).astype(np.uint8)


def draws(name: str, severity: int) -> np.random.Generator:
  """Returns what an image's corruption draws from."""
  return np.random.default_rng([zlib.crc32(name.encode()), severity])


def _functions(path: pathlib.Path) -> dict:
  text = path.read_text().split('Distortion Helpers', 1)[1].split('End Distortions')[0]
  text = re.sub(r'(?m)^(from|import) .*wand.*$|^wandlibrary.*\n(^ {10}.*\n)*', '', text)
  text = re.sub(r'(?m)^class MotionImage.*\n( .*\n|\n)*', '', text)
  text = text.replace('multichannel=True', 'channel_axis=-1').replace('np.float_', 'np.float64')
  text = text.replace('scipy.ndimage.interpolation', 'scipy.ndimage')
  found = {'np': np, 'PILImage': Image, '__name__': 'scripts'}
  exec('#' + text, found)
  return found


def _reference(functions: dict, library, name: str, severity: int, side: int) -> np.ndarray:
  own = draws(name, severity)
  picture, random = Image.fromarray(image(side)), np.random
  names = ('normal', 'poisson', 'uniform')
  with mock.patch.multiple(random, randint=own.integers, **{n: getattr(own, n) for n in names}):
    if name == 'impulse_noise':
      noise = functions['sk'].util.random_noise
      with mock.patch.object(
        functions['sk'].util, 'random_noise', lambda *a, **k: noise(*a, rng=own, **k)
      ):
        return np.uint8(functions[name](picture, severity))
    if name not in ('motion_blur', 'snow'):
      return np.uint8(functions[name](picture, severity))
    text = (pathlib.Path(library.__file__)).read_text()
    parameters = {
      32: {
        'motion_blur': [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        'snow': [(0.1, 0.2, 1, 0.6, 8, 3, 0.95), None, (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), None]
        + [(0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)],
      },
      224: {},
    }[side]
    body = text[text.index(f'def {name}(') :].split('\n\n\n')[0]
    if name in parameters:
      body = re.sub(
        r'c = \[.*?\]\[\s*severity - 1\]',
        f'c = {parameters[name]}[severity - 1]',
        body,
        count=1,
        flags=re.S,
      )
    space = vars(library) | {'clipped_zoom': functions['clipped_zoom']}
    exec(body, space)
    return np.uint8(space[name](picture, severity))


def main() -> None:
  """Makes the file."""
  scripts, library = (pathlib.Path(path).resolve() for path in sys.argv[1:])
  out = pathlib.Path(__file__).with_name('corruptions.npz').resolve()
  sys.path.insert(0, str(library))
  corruptions = importlib.import_module('imagecorruptions.corruptions')
  os.chdir(library / 'imagecorruptions' / 'frost')
  kept = {}
  for side, file in FILES.items():
    functions, every = _functions(scripts / file), side // 16 if side == 224 else 2
    for name in NAMES:
      for severity in SEVERITIES:
        found = _reference(functions, corruptions, name, severity, side)
        kept[f'{side} {name} {severity}'] = found[::every, ::every]
  np.savez_compressed(out, **kept)


if __name__ == '__main__':
  main()
