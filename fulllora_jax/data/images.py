"""Decodes image files with Pillow and brings them to one square size."""

import contextlib
import functools
import io
import os
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

_GRAYSCALE_MODES = ('1', 'L', 'LA')
# Formats of Pillow that are no pictures, or that it reads with a program of others' or not at all
_NO_PICTURES = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'PDF', 'WMF'}
# Of these the first image is the whole: a photo before its previews, the layers merged
_FIRST_IS_WHOLE = ('MPO', 'PSD')


def is_picture(name: str) -> bool:
  """Returns whether Pillow reads pictures with the suffix of a file's name.

  >>> is_picture('cat.JPEG'), is_picture('scan.tif'), is_picture('cat.txt')
  (True, True, False)
  """
  return Image.registered_extensions().get(os.path.splitext(name)[1].lower()) in _formats()


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
    One of `BROKEN`, if this is no image that `verify` accepts.
  """
  with _opened(source) as image:
    if 'transparency' in image.info:  # of a palette, else Pillow warns
      image = image.convert('RGBA')
    image = image.convert('L' if channels == 1 else 'RGB')
  pixels = np.asarray(_fit(image, size), np.uint8)
  return pixels[..., None] if channels == 1 else pixels


# What Pillow and its plugins raise for damaged files.
BROKEN = (
  OSError, SyntaxError, ValueError, LookupError, EOFError, TypeError, ArithmeticError, RuntimeError,
  struct.error, Image.DecompressionBombError,
)  # fmt: skip


def verify(source: str | io.BytesIO) -> int:
  """Decodes an image, a JPEG at an eighth of its size to be quick.

  Args:
    source: a path, or the bytes of the file.

  Returns:
    1 for a grayscale image, otherwise 3: its channels.

  Raises:
    One of `BROKEN`, if the file is damaged, cut short, not of 8 bits, or has several pages or
      frames. Of colours with 16 bits Pillow keeps the upper 8.
  """
  with _opened(source) as image:
    channels = 1 if image.mode in _GRAYSCALE_MODES else 3
    image.draft(image.mode, (max(image.width // 8, 1), max(image.height // 8, 1)))
    image.load()
  return channels


@contextlib.contextmanager
def _opened(source: bytes | str | io.BytesIO) -> Iterator[Image.Image]:
  """Opens an image; raises one of `BROKEN` where it is not one, or not of 8 bits."""
  file = io.BytesIO(source) if isinstance(source, bytes) else source
  # By name, so that a file that only looks like a picture starts no other program.
  with Image.open(file, formats=_formats()) as image:
    if image.mode.startswith(('I', 'F')):
      raise ValueError(f'pixels of mode {image.mode}, only 8 bits can be used')
    if getattr(image, 'is_animated', False) and image.format not in _FIRST_IS_WHOLE:
      count = getattr(image, 'n_frames', 'several')
      raise ValueError(f'{count} pages or frames, save the one that is meant as a file of its own')
    yield image


@functools.cache
def _formats() -> tuple[str, ...]:
  Image.init()  # imports the plugins of all formats
  return tuple(kind for kind in Image.ID if kind not in _NO_PICTURES)


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
