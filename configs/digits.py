"""FullLoRA on scikit-learn's 8 x 8 digits: the embedded default.

python -m fulllora_jax.main --config configs/digits.py
"""

from fulllora_jax import config as config_lib


def get_config(variant: str = ''):
  """Returns the config; the variant `tiny` runs in seconds."""
  c = config_lib.default()
  c.name = 'digits'
  c.model.update(
    name='vit', width=96, depth=4, num_heads=4, mlp_dim=384, patch_size=2
  )
  c.model.mean, c.model.std = (0.3,), (0.38,)
  c.adapter.rank, c.adapter.alpha = 4, 8.0
  c.data.name = 'digits'
  c.data.image_size = 8
  c.data.validation_fraction = 0.1
  c.threat.eps = '0.1'
  c.attack.steps = 5
  c.attack.step_size = '0.03'
  c.augment.update(crop_padding=1, flip=False, mix_probability=0.0)
  c.optimizer = config_lib.adamw(learning_rate=3e-3, weight_decay=1e-4)
  c.schedule = config_lib.cosine(warmup=0.05)
  c.train.update(
    steps=1000,
    batch_size=64,
    log_every=100,
    eval_every=200,
    checkpoint_every=200,
  )
  c.base.optimizer = config_lib.adamw(learning_rate=1e-3, weight_decay=0.05)
  c.base.schedule = config_lib.cosine(warmup=0.05)
  c.base.augment = type(c)(c.augment.to_dict())
  c.base.train.update(
    steps=800,
    batch_size=64,
    log_every=200,
    eval_every=400,
    checkpoint_every=200,
  )
  c.eval.step_size = '0.01'
  return c
