"""What a config file's name may carry after a colon.

`configs/cifar10.py:tiny` runs the same experiment with a model for a CPU, and
`configs/cifar10.py:deit_s` starts from another published checkpoint. These are
timm's conversions, on the Hugging Face hub, of the authors' own weights. `fast`
trains with a shorter attack, alone or after another variant: `deit_s,fast`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections.config_dict import ConfigDict

from fulllora_jax.core.errors import UserError
from fulllora_jax.training.inner_attack import few_steps


class Published(NamedTuple):
  """A published checkpoint, and what goes with it."""

  model: str  # name in the registry (models/__init__.py)
  timm: str  # name on the hub
  rank: int  # rank of the adapter: about 5 % of the model learns
  patch_size: int = 16  # the model's own, in pixels; kept on large images
  variant: str = ''  # what it is called after a colon; '': the model's name

  @property
  def source(self) -> str:
    """The `base.source` that fetches it."""
    return f'hf-hub:timm/{self.timm}'


_MODELS = (
  Published('vit_ti', 'vit_tiny_patch16_224.augreg_in21k', 6),
  Published('vit_s', 'vit_small_patch16_224.augreg_in21k', 12),
  Published('vit_b', 'vit_base_patch16_224.augreg_in21k', 24),
  Published('vit_b', 'vit_base_patch16_224.augreg_in1k', 24, variant='vit_b_in1k'),
  Published('vit_l', 'vit_large_patch16_224.augreg_in21k', 32),
  Published('deit_ti', 'deit_tiny_patch16_224.fb_in1k', 6),
  Published('deit_s', 'deit_small_patch16_224.fb_in1k', 12),
  Published('deit_b', 'deit_base_patch16_224.fb_in1k', 24),
  Published('deit_distilled_ti', 'deit_tiny_distilled_patch16_224.fb_in1k', 6),
  Published('deit_distilled_s', 'deit_small_distilled_patch16_224.fb_in1k', 12),
  Published('deit_distilled_b', 'deit_base_distilled_patch16_224.fb_in1k', 24),
  Published('swin_t', 'swin_tiny_patch4_window7_224.ms_in1k', 14, 4),
  Published('swin_s', 'swin_small_patch4_window7_224.ms_in1k', 13, 4),
  Published('swin_b', 'swin_base_patch4_window7_224.ms_in22k_ft_in1k', 18, 4),
  Published('swin_l', 'swin_large_patch4_window7_224.ms_in22k_ft_in1k', 27, 4),
  Published('convit_ti', 'convit_tiny.fb_in1k', 6),
  Published('convit_s', 'convit_small.fb_in1k', 12),
  Published('convit_b', 'convit_base.fb_in1k', 24),
  Published('dinov2_s', 'vit_small_patch14_dinov2.lvd142m', 12, 14),
  Published('dinov2_b', 'vit_base_patch14_dinov2.lvd142m', 24, 14),
  Published('dinov2_reg_s', 'vit_small_patch14_reg4_dinov2.lvd142m', 12, 14),
  Published('dinov2_reg_b', 'vit_base_patch14_reg4_dinov2.lvd142m', 24, 14),
  Published('clip_b', 'vit_base_patch16_clip_224.openai', 24),
  Published('siglip_b', 'vit_base_patch16_siglip_224.webli', 24),
)
PUBLISHED = {each.variant or each.model: each for each in _MODELS}


def with_variant(
  config: ConfigDict,
  variant: str,
  published: str = '',
  own: Mapping[str, Callable[[ConfigDict], None]] | None = None,
) -> ConfigDict:
  """Applies what a config file's name may carry after a colon.

  Args:
    config: changed in place.
    variant: '' for the config as it is; 'tiny'; a key of `own`; or, where `published` is not empty,
      a name in PUBLISHED. Each may be followed by ',fast', and 'fast' may stand alone.
    published: the name in PUBLISHED that '' stands for.
    own: variants of this config file alone: name -> a function that changes the config.

  Raises:
    UserError: another variant.
  """
  size, *more = variant.split(',') if variant != 'fast' else ('', 'fast')
  own = {'tiny': tiny, **(own or {})}
  known = (*own, *(PUBLISHED if published else ()))
  if variant not in ('', 'fast') and (size not in known or more not in ([], ['fast'])):
    raise UserError(
      f'config variant: unknown {variant!r}; known: {", ".join(known)}, fast, '
      'and fast after another, as in tiny,fast'
    )
  if size in own:
    own[size](config)
  elif size or published:
    start_from(config, PUBLISHED[size or published])
    config.name += f'-{size}' if size else ''
  return fast(config) if more else config


def start_from(config: ConfigDict, base: Published) -> None:
  """Makes a published checkpoint the base, for images of the config's size.

  At 32 px the patches get smaller, so that there are tokens enough: 4 px, as
  in Mo et al. (NeurIPS 2022), and for Swin 2 px in windows of 4.
  """
  config.model.name, config.base.source = base.model, base.source
  config.adapter.rank, config.adapter.alpha = base.rank, float(base.rank)
  config.model.patch_size = base.patch_size
  if config.data.image_size <= 64:
    config.model.patch_size = 4
    if base.model.startswith('swin'):
      config.model.patch_size, config.model.window = 2, 4
      # A patch of 2 x 2 colours has 12 numbers, fewer than the rank.
      config.adapter.overrides = ('patch_embed.rank=8',)
  if base.patch_size % config.model.patch_size:
    config.base.patch_resize = 'flexi'  # a patch of 14 px makes no cells of 4


def tiny(config: ConfigDict) -> None:
  """Shrinks to a model of 0.1 M parameters, trained here in few steps."""
  config.name += '_tiny'
  config.base.source = 'train'
  config.model.update(name='vit', width=64, depth=2, num_heads=2, mlp_dim=256)
  config.adapter.rank, config.adapter.alpha = 2, 2.0
  config.attack.steps = 3
  for recipe, steps in ((config.train, 60), (config.base.train, 150)):
    recipe.update(steps=steps, batch_size=64, log_every=20)
    recipe.update(eval_every=1000, checkpoint_every=50)
  config.eval.update(num_examples=256, batch_size=128)
  config.eval.validation_examples = 128


def fast(config: ConfigDict) -> ConfigDict:
  """Trains with two attack steps from where the last ended: 3 passes, not 11.

  Both together may cross the ball (Wong et al., 2020, have one step of 1.25
  eps). docs/road.md has what that gave, and what else was tried.
  """
  config.name += '-fast'
  config.attack.carry = True
  few_steps(config, 2)
  return config
