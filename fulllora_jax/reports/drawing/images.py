"""Images inside of a page or a picture: PNG in data: URIs."""

import base64
import io

import numpy as np
from PIL import Image

_SMALL = 96  # pixels; up to here each pixel is shown as a square


def data_uri(image: np.ndarray) -> str:
  """Returns an image as the address of itself.

  Args:
    image: float [H, W, C], cut to [0, 1]; C is 1 or 3 (of another number, the
      first channel is shown).
  """
  levels = np.clip(np.asarray(image, np.float32), 0, 1) * 255 + 0.5
  levels = levels.astype(np.uint8)
  if levels.shape[-1] != 3:
    levels = levels[..., 0]
  content = io.BytesIO()
  Image.fromarray(levels).save(content, 'PNG', optimize=True)
  encoded = base64.b64encode(content.getvalue()).decode()
  return f'data:image/png;base64,{encoded}'


def look(image: np.ndarray) -> str | None:
  """Returns the class that shows the pixels of a small image as squares."""
  return 'pixels' if max(np.shape(image)[:2]) <= _SMALL else None


def difference(clean: np.ndarray, adversarial: np.ndarray) -> tuple[np.ndarray, float]:
  """Returns the magnified difference of images on grey, and by how much.

  The largest change goes from grey to black or white.

  Args:
    clean: float [..., H, W, C] in [0, 1].
    adversarial: what an attack made of them, of the same shape.
  """
  change = np.asarray(adversarial) - np.asarray(clean)
  largest = float(np.abs(change).max())
  scale = 0.5 / largest if largest > 0 else 1.0
  return 0.5 + scale * change, scale
