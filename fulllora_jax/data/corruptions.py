"""The 15 common corruptions at 5 severities, made from any uint8 images.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019 (arXiv 1903.12261): images of up to 64 pixels get the parameters of
CIFAR-10-C, larger ones those of ImageNet-C. Motion is blurred as in bethgelab/imagecorruptions,
without ImageMagick. The photographs of frost are theirs (frost/NOTICE). Their libraries want
OpenCV, scikit-image and numba, have no parameters for small images, and draw from global states.
"""

import functools
import io
import math
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import numpy as np
from PIL import Image

from fulllora_jax.data.splits import Split

SEVERITIES = 5
_SMALL = 64  # pixels, up to which an image has the parameters of CIFAR-10-C
_GREY = np.array([0.299, 0.587, 0.114])

Draws = np.random.Generator


def corrupted(split: Split, name: str, severity: int, seed: int) -> Split:
  """Returns a split whose images are corrupted when they are fetched.

  What is drawn for an image follows from the seed, the corruption, its severity and the image's
  index, so it is the same in whatever batch and on whatever process.
  """

  def one(image: np.ndarray, index: int) -> np.ndarray:
    draws = np.random.default_rng([seed, zlib.crc32(name.encode()), severity, int(index)])
    return corrupt(image, name, severity, draws)

  def fetch(indices: np.ndarray) -> np.ndarray:
    images = split.fetch(indices)
    if not len(images):
      return images
    with ThreadPoolExecutor() as pool:
      return np.stack(list(pool.map(one, images, indices)))

  return Split(split.name, split.labels, fetch, split.contents)


def corrupt(image: np.ndarray, name: str, severity: int, draws: Draws) -> np.ndarray:
  """Returns an image with one corruption.

  Args:
    image: uint8 [H, W, C], with C of 1 or 3.
    name: one of `NAMES`.
    severity: 1 to 5.
    draws: what chance there is in the corruption.

  Returns:
    The corrupted image, uint8 of the same shape; a fraction of a level is cut off, as there.
  """
  channels = image.shape[-1]
  colours = np.repeat(image, 3, axis=-1) if channels == 1 else image
  make, *parameters = _ALL[name]
  chosen = parameters[max(image.shape[:2]) > _SMALL][severity - 1]
  x = np.clip(make(colours / 255, chosen, draws), 0, 1)
  if channels == 1:
    x = (x @ _GREY)[..., None]
  return (255 * x + 1e-6).astype(np.uint8)  # 1e-6: a whole level stays what it is


def _gaussian_noise(x, scale, draws):
  return x + draws.normal(size=x.shape, scale=scale)


def _shot_noise(x, photons, draws):
  return draws.poisson(x * photons) / photons


def _impulse_noise(x, amount, draws):
  hit, white = draws.random(x.shape) <= amount, draws.random(x.shape) <= 0.5
  return np.where(hit, white, x)


def _blur(x: np.ndarray, sigma, mode: str = 'nearest', truncate: float = 4.0) -> np.ndarray:
  """Blurs the first two axes by a Gaussian of sigma pixels."""
  from scipy import ndimage

  return ndimage.gaussian_filter(x, (sigma, sigma, 0)[: x.ndim], mode=mode, truncate=truncate)


def _defocus_blur(x, parameters, draws):
  from scipy import ndimage, signal

  radius, alias = parameters
  reach, wide = (8, 1) if radius <= 8 else (radius, 2)
  axis = np.arange(-reach, reach + 1)
  disk = (np.add.outer(axis**2, axis**2) <= radius**2).astype(float)
  disk /= disk.sum()
  line = np.exp(-(np.arange(-wide, wide + 1) ** 2) / (2 * alias**2))
  for side in (0, 1):
    disk = ndimage.correlate1d(disk, line / line.sum(), axis=side, mode='mirror')
  padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), 'reflect')
  return signal.fftconvolve(padded, disk[..., None], 'valid', axes=(0, 1))


def _glass_blur(x, parameters, draws):
  sigma, most, rounds = parameters
  height, width, _ = x.shape
  x = np.floor(_blur(x, sigma) * 255 + 1e-9) / 255
  rows, columns = range(height - most, most, -1), range(width - most, most, -1)
  moves = draws.integers(-most, most, (rounds * len(rows) * len(columns), 2))
  offsets = iter((moves[:, 1] * width + moves[:, 0]).tolist())
  source = list(range(height * width))  # of each pixel; each takes that of one beside it, in turn
  for row in list(rows) * rounds:
    for place in range(row * width + columns[0], row * width + columns[-1] - 1, -1):
      source[place] = source[place + next(offsets)]
  return _blur(x.reshape(-1, 3)[source].reshape(x.shape), sigma)


def _motion(x: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
  """Blurs towards one side, along a line at an angle in degrees; the border goes on outside."""
  height, width = x.shape[:2]
  weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
  blurred = np.zeros_like(x)
  for step, weight in enumerate(weights / weights.sum()):
    down, right = (
      -math.ceil(step * part - 0.5)
      for part in (np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle)))
    )
    if abs(down) >= height or abs(right) >= width:
      break
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    blurred += weight * x[rows][:, columns]
  return blurred


def _motion_blur(x, parameters, draws):
  return _motion(x, *parameters, draws.uniform(-45, 45))


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
  """Returns the middle of an image, [H, W, C], enlarged to its size."""
  from scipy import ndimage

  sides = [math.ceil(side / factor) for side in x.shape[:2]]
  top, left = ((side - part) // 2 for side, part in zip(x.shape, sides, strict=False))
  found = ndimage.zoom(
    x[top : top + sides[0], left : left + sides[1]], (factor, factor, 1), order=1
  )
  top, left = ((big - side) // 2 for big, side in zip(found.shape, x.shape[:2], strict=False))
  return found[top : top + x.shape[0], left : left + x.shape[1]]


def _zoom_blur(x, parameters, draws):
  factors = np.arange(1, *parameters)
  return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(x, parameters, draws):
  mean, spread, zoom, least, radius, sigma, keep = parameters
  layer = _zoomed(draws.normal(size=x.shape[:2], loc=mean, scale=spread)[..., None], zoom)
  layer = np.clip(np.where(layer < least, 0, layer), 0, 1)
  layer = np.round(_motion(layer, radius, sigma, draws.uniform(-135, -45)) * 255) / 255
  whiter = np.maximum(x, (x @ _GREY)[..., None] * 1.5 + 0.5)
  return keep * x + (1 - keep) * whiter + layer + np.rot90(layer, k=2)


@functools.cache
def _frosts() -> list[Image.Image]:
  folder = resources.files('fulllora_jax.data') / 'frost'
  found = []
  for number in (1, 2, 2, 4, 5):  # theirs draw from the first five of six; 3 is 2
    content = (folder / f'frost{number}.jpg').read_bytes()
    found.append(Image.open(io.BytesIO(content)).convert('RGB'))
  return found


def _frost(x, parameters, draws):
  height, width, _ = x.shape
  photograph = _frosts()[draws.integers(5)]
  if max(height, width) <= _SMALL:
    size = [round(side * 0.2) for side in photograph.size]
    frost = np.asarray(photograph)[2::5, 2::5][: size[1], : size[0]]
  elif (factor := 1.1 * max(height / photograph.height, width / photograph.width)) > 1.1:
    size = tuple(math.ceil(side * factor) for side in photograph.size)
    frost = np.asarray(photograph.resize(size, Image.Resampling.BICUBIC))
  else:
    frost = np.asarray(photograph)
  top, left = (
    draws.integers(0, max(1, big - side))
    for big, side in zip(frost.shape[:2], x.shape[:2], strict=True)
  )
  share, cover = parameters
  return share * x + cover * frost[top : top + height, left : left + width] / 255


def _plasma(size: int, decay: float, draws: Draws) -> np.ndarray:
  """Returns a cloudy map [size, size] in [0, 1] by diamonds and squares; size is a power of 2."""
  found, step, wibble = np.zeros((size, size)), size, 100.0

  def mean(total):
    return total / 4 + wibble * draws.uniform(-wibble, wibble, total.shape)

  while step >= 2:
    half = step // 2
    corners = found[::step, ::step]
    total = corners + np.roll(corners, -1, axis=0)
    found[half::step, half::step] = mean(total + np.roll(total, -1, axis=1))
    middles, corners = found[half::step, half::step], found[::step, ::step]
    sides = middles + np.roll(middles, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
    found[::step, half::step] = mean(sides)
    sides = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
    found[half::step, ::step] = mean(sides)
    step, wibble = half, wibble / decay
  found -= found.min()
  return found / found.max()


def _fog(x, parameters, draws):
  amount, decay = parameters
  size = 1 << (max(x.shape[:2]) - 1).bit_length()
  clouds = _plasma(size, decay, draws)[: x.shape[0], : x.shape[1], None]
  return (x + amount * clouds) * x.max() / (x.max() + amount)


def _brightness(x, amount, draws):
  value = x.max(axis=-1, keepdims=True)  # of HSV; hue and saturation stay
  wanted = np.clip(value + amount, 0, 1)
  return np.where(value > 0, x * wanted / np.where(value > 0, value, 1), wanted)


def _contrast(x, share, draws):
  means = x.mean(axis=(0, 1), keepdims=True)
  return (x - means) * share + means


def _elastic_transform(x, parameters, draws):
  from scipy import ndimage

  side = min(x.shape[:2])
  unit = 32 if side <= _SMALL else 244  # 244 as published, for 224 pixels
  amount, sigma, most = (part * unit for part in parameters)
  middle, third = np.array(x.shape[:2]) // 2, side // 3
  corners = np.array([middle + third, [middle[0] + third, middle[1] - third], middle - third])
  moved = corners + draws.uniform(-most, most, size=corners.shape)
  known = np.column_stack([moved, np.ones(3)])
  back = np.linalg.solve(known, corners)  # [3, 2], from the place of a pixel to its source (x, y)
  rows, columns = np.indices(x.shape[:2])
  sources = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back
  places = [sources[..., 1], sources[..., 0]]
  bent = [ndimage.map_coordinates(c, places, order=1, mode='mirror') for c in np.moveaxis(x, 2, 0)]
  right, down = (
    _blur(draws.uniform(-1, 1, size=x.shape[:2]), sigma, 'reflect', 3) * amount for _ in range(2)
  )
  places = [rows + down, columns + right]
  bent = [ndimage.map_coordinates(c, places, order=1, mode='reflect') for c in bent]
  return np.stack(bent, axis=-1)


def _pixelate(x, share, draws):
  picture, (height, width) = _picture(x), x.shape[:2]
  small = picture.resize((int(width * share), int(height * share)), Image.Resampling.BOX)
  return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def _jpeg_compression(x, quality, draws):
  content = io.BytesIO()
  _picture(x).save(content, 'JPEG', quality=quality)
  return np.asarray(Image.open(content)) / 255


def _picture(x: np.ndarray) -> Image.Image:
  return Image.fromarray(np.round(255 * x).astype(np.uint8))


# The function, and its parameters at the five severities for small and for large images, in the
# order of the paper's tables (create_c/make_cifar_c.py and make_imagenet_c.py of theirs).
_ALL: dict[str, tuple[Callable, tuple, tuple]] = {
  'gaussian_noise': (
    _gaussian_noise,
    (0.04, 0.06, 0.08, 0.09, 0.10),
    (0.08, 0.12, 0.18, 0.26, 0.38),
  ),
  'shot_noise': (_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
  'impulse_noise': (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
  'defocus_blur': (
    _defocus_blur,
    ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
  ),
  'glass_blur': (
    _glass_blur,
    ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
  ),
  'motion_blur': (
    _motion_blur,
    ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
  ),
  'zoom_blur': (
    _zoom_blur,
    ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
  ),
  'snow': (
    _snow,
    (
      (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
      (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
      (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
      (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
      (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    (
      (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
      (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
      (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
      (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
      (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
  ),
  'frost': (
    _frost,
    ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
  ),
  'fog': (
    _fog,
    ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
  ),
  'brightness': (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
  'contrast': (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
  'elastic_transform': (
    _elastic_transform,
    ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
  ),
  'pixelate': (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
  'jpeg_compression': (_jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
NAMES = tuple(_ALL)
