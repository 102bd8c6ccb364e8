"""Images inside of a page: PNG in data: URIs."""

import base64
import io

import numpy as np
from PIL import Image

from fulllora_jax.reports.page.markup import Markup, tag

_SMALL = 96  # pixels; up to here each pixel is shown as a square


def data_uri(image: np.ndarray) -> str:
  """Returns an image as the address of itself.

  Args:
    image: float [H, W, C] in [0, 1], or outside and then cut; C is 1 or 3 (of
      other numbers, the first channel is shown).
  """
  levels = np.clip(np.asarray(image, np.float32), 0, 1) * 255 + 0.5
  levels = levels.astype(np.uint8)
  if levels.shape[-1] != 3:
    levels = levels[..., 0]
  content = io.BytesIO()
  Image.fromarray(levels).save(content, 'PNG', optimize=True)
  encoded = base64.b64encode(content.getvalue()).decode()
  return f'data:image/png;base64,{encoded}'


def trio(
  clean: np.ndarray, adversarial: np.ndarray, words: tuple, names: tuple
) -> Markup:
  """Returns an image, its adversarial twin and their difference, side by side.

  The difference is magnified so that the largest change goes from grey to
  black or white.

  Args:
    clean: float32 [H, W, C] in [0, 1].
    adversarial: likewise.
    words: below the first two.
    names: alternative texts of the first two.
  """
  difference = np.asarray(adversarial) - np.asarray(clean)
  largest = float(np.abs(difference).max())
  scale = 0.5 / largest if largest > 0 else 1.0
  small = max(clean.shape[:2]) <= _SMALL
  shown = (
    (clean, names[0], words[0]),
    (adversarial, names[1], words[1]),
    (
      0.5 + scale * difference,
      f'their difference, magnified {scale:.3g} times',
      [tag('span', 'difference'), f'×{scale:.3g}'],
    ),
  )
  return tag(
    'div',
    [
      tag(
        'div',
        tag('img', src=data_uri(image), alt=name),
        tag('div', below),
      )
      for image, name, below in shown
    ],
    class_='trio pixels' if small else 'trio',
  )
