"""FullLoRA on Imagenette, ViT-B/16 at 224 px: the inherited protocol.

  python -m fulllora_jax.main --config configs/imagenette.py

One accelerator with 80 GB (with less: --config.train.accumulate=4). The data
are `imagenette/full-size`, the v1 split that Mo et al. (NeurIPS 2022) use; its
validation split is the test set here. The base is the AugReg ViT-B/16 from the
Hugging Face hub; `:swin_b`, `:dinov2_s` and others take another one
(experiments/variants.py). No accuracy is promised for this file: it has not
been run to its end yet. The variant `:tiny` runs the same experiment at 32 px
on a CPU in a few minutes, most of which goes into reading the images.
"""

from fulllora_jax import config as config_lib
from fulllora_jax.experiments import variants


def get_config(variant: str = ''):
  """Returns the config; variants.py says what may follow the colon."""
  config = config_lib.default()
  config.name = 'imagenette'
  config.model.patch_size = 16
  config.data.name = 'imagenette/full-size'
  config.data.image_size = 224
  config.data.test_split = 'validation'
  config.data.validation_fraction = 0.05
  # In pixels; the same share of the side as 4 of 32.
  config.augment.crop_padding = config.base.augment.crop_padding = 28
  config.base.train.batch_size = 128
  config.eval.batch_size = 64
  if variant.split(',')[0] == 'tiny':
    config.model.patch_size = 4
    config.data.image_size = 32
    config.augment.crop_padding = config.base.augment.crop_padding = 4
  return variants.with_variant(config, variant, published='vit_b')
