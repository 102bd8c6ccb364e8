"""Decodes image files with Pillow and brings them to one square size."""

import io
import os

import numpy as np
from PIL import Image

_GRAYSCALE_MODES = ('1', 'L', 'LA')


def decode(source: bytes | str, size: int, channels: int) -> np.ndarray:
  """Decodes one image.

  Args:
    source: the encoded bytes, or the path of a file.
    size: side of the result in pixels; an image of another size is resized
      (bicubic) so that its shorter side has this length, then centre-cropped.
    channels: 1 (grayscale) or 3 (RGB; palettes and transparency are resolved).

  Returns:
    uint8 [size, size, channels], values 0..255.

  Raises:
    OSError, SyntaxError, ValueError, Image.DecompressionBombError: by Pillow,
      if this is not a readable image.
  """
  with Image.open(_opened(source)) as image:
    if 'transparency' in image.info:  # of a palette, else Pillow warns
      image = image.convert('RGBA')
    image = image.convert('L' if channels == 1 else 'RGB')
  pixels = np.asarray(_fit(image, size), np.uint8)
  return pixels[..., None] if channels == 1 else pixels


# What Pillow raises for damaged files: SyntaxError comes from broken PNGs.
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def verify(source: str | io.BytesIO) -> int:
  """Decodes an image, a JPEG at an eighth of its size to be quick.

  Args:
    source: a path, or the bytes of the file.

  Returns:
    1 for a grayscale image, otherwise 3: its channels.

  Raises:
    One of `BROKEN`, if the file is damaged, cut short, or not of 8 bits.
  """
  with Image.open(source) as image:
    if image.mode.startswith(('I', 'F')):
      raise ValueError(f'pixels of mode {image.mode}, only 8 bits can be used')
    channels = 1 if image.mode in _GRAYSCALE_MODES else 3
    image.draft(image.mode, (image.width // 8, image.height // 8))
    image.load()
  return channels


def _opened(source: bytes | str) -> io.BytesIO | str:
  return io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)


def _fit(image: Image.Image, size: int) -> Image.Image:
  if image.size == (size, size):
    return image
  width, height = image.size
  scale = size / min(width, height)
  width = max(size, round(width * scale))
  height = max(size, round(height * scale))
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - size) // 2, (height - size) // 2
  return image.crop((left, top, left + size, top + size))
