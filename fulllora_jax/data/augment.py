"""Augmentation on the device, inside the jitted step; images in [0, 1]."""

import dataclasses

import jax
import jax.numpy as jnp

# The probability of cutmix where mixup is on too, as in timm.
_SWITCH_PROBABILITY = 0.5


def to_unit(images: jax.Array) -> jax.Array:
  """Converts uint8 pixels 0..255 of any shape to float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Crops and flips every image, then mixes the batch with its reverse.

  Crop, flip and mixing are drawn from a key and the row alone, so that what was done to a batch can
  be done to something else too, and undone. Mixing follows timm's batch mode: with
  `mix_probability` the whole batch is mixed, by mixup (Zhang et al., 2018, arXiv 1710.09412) or
  cutmix (Yun et al., 2019, arXiv 1905.04899), with equal chance where both are on.
  """

  num_classes: int  # K
  # Pixels of zeros around the image, from which a window of its size is cut; 0: no crop.
  crop_padding: int
  flip: bool  # whether to mirror images left to right with probability 1/2
  mixup: float  # alpha of mixup's lambda ~ Beta(alpha, alpha); 0: no mixup
  cutmix: float  # alpha of cutmix's lambda ~ Beta(alpha, alpha); 0: no cutmix
  mix_probability: float  # the probability that a batch is mixed, in [0, 1]

  def __call__(
    self, key: jax.Array, images: jax.Array, labels: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Augments a batch.

    Args:
      key: a PRNG key.
      images: float32 [B, H, W, C] in [0, 1].
      labels: int [B].

    Returns:
      float32 [B, H, W, C] images in [0, 1], and the labels: untouched if mixing is off
      (mix_probability or both alphas 0), otherwise float32 [B, K] rows that sum to 1.
    """
    images = self.move(key, images)
    if not self._may_mix:
      return images, labels
    soft_labels = jax.nn.one_hot(labels, self.num_classes, dtype=jnp.float32)
    return _mix(*self._mixing(key), images, soft_labels, self.mixup, self.cutmix)

  def move(self, key: jax.Array, images: jax.Array) -> jax.Array:
    """Crops and flips [B, H, W, C] of any dtype, as the key says."""
    if not self._moves:
      return images
    return jax.vmap(self._move_one)(self._keys(key, images), images)

  def undo_move(self, key: jax.Array, moved: jax.Array, before: jax.Array) -> jax.Array:
    """Moves pixels back; those that were cut off stay as in `before`.

    Args:
      key: the key that was given to `move`.
      moved: [B, H, W, C], the result of `move`, perhaps changed since.
      before: [B, H, W, C], what was given to `move`.
    """
    if not self._moves:
      return moved
    return jax.vmap(self._undo_one)(self._keys(key, moved), moved, before)

  def is_mixed(self, key: jax.Array) -> jax.Array:
    """Returns whether a batch with this key is mixed, bool []."""
    return self._mixing(key)[0] if self._may_mix else jnp.array(False)

  @property
  def _moves(self) -> bool:
    return self.crop_padding > 0 or self.flip

  @property
  def _may_mix(self) -> bool:
    return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

  def _keys(self, key, images):
    image_key, _ = jax.random.split(key)
    rows = jnp.arange(images.shape[0])
    return jax.vmap(jax.random.fold_in, (None, 0))(image_key, rows)

  def _mixing(self, key):
    """Returns whether to mix, the key of mixup or cutmix, and that of how."""
    _, mix_key = jax.random.split(key)
    apply_key, switch_key, key = jax.random.split(mix_key, 3)
    apply = jax.random.bernoulli(apply_key, self.mix_probability)
    return apply, switch_key, key

  def _move_one(self, key, image):
    crop_key, flip_key = jax.random.split(key)
    if self.crop_padding > 0:
      corner = self._corner(crop_key)
      image = jax.lax.dynamic_slice(self._pad(image), corner, image.shape)
    return self._mirror(flip_key, image)

  def _undo_one(self, key, image, before):
    crop_key, flip_key = jax.random.split(key)
    image = self._mirror(flip_key, image)
    if self.crop_padding > 0:
      corner = self._corner(crop_key)
      padded = jax.lax.dynamic_update_slice(self._pad(before), image, corner)
      own = (self.crop_padding, self.crop_padding, 0)
      image = jax.lax.dynamic_slice(padded, own, before.shape)
    return image

  def _corner(self, key):
    top, left = jax.random.randint(key, (2,), 0, 2 * self.crop_padding + 1)
    return top, left, 0

  def _pad(self, image):
    sides = (self.crop_padding, self.crop_padding)
    return jnp.pad(image, (sides, sides, (0, 0)))

  def _mirror(self, key, image):
    if not self.flip:
      return image
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def _mix(apply, switch_key, key, images, labels, mixup, cutmix):
  """Mixes float32 [B, H, W, C] images and [B, K] labels."""

  def by_mixup():
    lam = jax.random.beta(key, mixup, mixup)
    return lam * images + (1 - lam) * images[::-1], lam

  def by_cutmix():
    lam_key, box_key = jax.random.split(key)
    lam = jax.random.beta(lam_key, cutmix, cutmix)
    box = _box(box_key, images.shape[1:3], lam)
    lam = 1 - jnp.mean(box.astype(jnp.float32))  # of the clipped box
    return jnp.where(box[None, :, :, None], images[::-1], images), lam

  if mixup > 0 and cutmix > 0:
    use_cutmix = jax.random.bernoulli(switch_key, _SWITCH_PROBABILITY)
    mixed, lam = jax.lax.cond(use_cutmix, by_cutmix, by_mixup)
  else:
    mixed, lam = by_cutmix() if cutmix > 0 else by_mixup()
  lam = jnp.where(apply, lam, 1.0)
  images = jnp.where(apply, mixed, images)
  return images, lam * labels + (1 - lam) * labels[::-1]


def _box(key, size, lam):
  """Returns a bool [H, W] box of area share 1 - lam, clipped by the border."""
  inside = []
  for axis_key, length in zip(jax.random.split(key), size, strict=True):
    side = (length * jnp.sqrt(1 - lam)).astype(jnp.int32)
    low = jax.random.randint(axis_key, (), 0, length) - side // 2
    position = jnp.arange(length)
    # As timm: half a side before and after the centre.
    inside.append((position >= low) & (position < low + 2 * (side // 2)))
  return inside[0][:, None] & inside[1][None, :]
