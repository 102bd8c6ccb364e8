"""FullLoRA on Imagenette, ViT-B/16 at 224 px: the inherited protocol.

  python -m fulllora_jax.main --config configs/imagenette.py

One accelerator with 80 GB (with less: --config.train.accumulate=4). The data
are `imagenette/full-size`, the v1 split that Mo et al. (NeurIPS 2022) use; its
validation split is the test set here. The base is the AugReg ViT-B/16 from the
Hugging Face hub; `:swin_b`, `:dinov2_s` and the like take another one
(experiments/variants.py). No accuracy is promised for this file: it has not
been run to its end yet. The variant `:tiny` runs the same road at 32 px on a
CPU in a few minutes, most of which goes into reading the images.
"""

from fulllora_jax import config as config_lib
from fulllora_jax.experiments import variants


def get_config(variant: str = ''):
  """Returns the config; see variants.py for what follows the colon."""
  c = config_lib.default()
  c.name = 'imagenette'
  c.model.patch_size = 16
  c.data.name = 'imagenette/full-size'
  c.data.image_size = 224
  c.data.test_split = 'validation'
  c.data.validation_fraction = 0.05
  c.augment.crop_padding = 28  # pixels; the same share of the side as 4 of 32
  c.base.augment.crop_padding = 28
  c.base.train.batch_size = 128
  c.eval.batch_size = 64
  if variant.split(',')[0] == 'tiny':
    c.model.patch_size = 4
    c.data.image_size = 32
    c.augment.crop_padding = c.base.augment.crop_padding = 4
  return variants.with_variant(c, variant, published='vit_b')
