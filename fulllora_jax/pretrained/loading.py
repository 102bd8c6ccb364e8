"""Published checkpoints into our models: exactly, or not at all.

open_checkpoint   finds the weights, their layout, and which model they are
configure         puts into a config what the checkpoint decides
convert           brings every array to its leaf, at the config's sizes
load              does all of it, for a model without a config
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from fulllora_jax import config as config_lib
from fulllora_jax import models
from fulllora_jax.adapters import artefact as artefact_lib
from fulllora_jax.core.console import warn
from fulllora_jax.core.errors import UserError, few
from fulllora_jax.core.files import as_path
from fulllora_jax.models import published_names
from fulllora_jax.pretrained import (
  convit,
  formats,
  head_names,
  preprocessing,
  sources,
  swin,
  transformers_vit,
  vit,
)
from fulllora_jax.pretrained.base import RUN, resolve_base
from fulllora_jax.pretrained.filling import Filler
from fulllora_jax.pretrained.layout import Architecture, Layout, Opened, Rule
from fulllora_jax.pretrained.load_report import LoadReport

LAYOUTS: tuple[Layout, ...] = (
  *vit.LAYOUTS,
  *transformers_vit.LAYOUTS,
  *swin.LAYOUTS,
  *convit.LAYOUTS,
)

# What weights are made for; anything else can be resized or chosen.
_STRUCTURE = (
  'width', 'depth', 'num_heads', 'mlp_dim', 'depths', 'heads', 'local_layers',
  'dist_token', 'registers', 'pre_norm', 'layer_scale', 'swiglu',
)  # fmt: skip


def open_checkpoint(
  source: str | Path, model=None, told: Mapping[str, Any] | None = None
) -> Opened:
  """Finds a checkpoint and recognises it; reads no weights yet.

  Args:
    source: a file or folder, hf-hub:owner/name[@revision], an URL with
      #sha256=... (sources.py), or a run of ours.
    model: the `model` part of a config, which says what neither arrays nor config.json do: the
      number of heads, or all that timm's name stands for; None: nobody asks for a model.
    told: what the user knows of it, which goes before what its files say, by
      `preprocessing.told_of`.

  Raises:
    UserError: it is not there or damaged, or no layout recognises it.
  """
  if resolve_base(source).kind == RUN:
    if told:
      raise UserError(f'{source} is a run, which has its own mean, std and act; leave them out')
    return _open_artefact(as_path(source))
  fetched = sources.fetch(str(source))
  tensors, shapes, _ = formats.read(fetched.files)
  with _naming(source):
    # timm's models that are not here say why.
    published_names.find(str(fetched.config.get('architecture', '')))
    for layout in LAYOUTS:
      if layout.recognises(shapes):
        asked = {'wanted': {**models.settings(model), 'name': model.name}} if model else {}
        described, names = _describe(layout, shapes, {**fetched.config, **asked}, told or {})
        return Opened(tensors, shapes, layout, described, fetched.identity, names)
    raise UserError(
      f'it holds no model that is known here; its first keys are {few(sorted(shapes))}; '
      f'known layouts: {", ".join(layout.name for layout in LAYOUTS)}'
    )


def _describe(
  layout: Layout, shapes, settings, told
) -> tuple[Architecture, tuple[tuple[str, ...], ...]]:
  """Describes a checkpoint, and names its classes."""
  try:
    described = layout.describe(shapes, settings)
    stated = preprocessing.read(settings)
    assumed = {'mean', 'std', *described.assumed} - stated.keys() - told.keys()
    described = described._replace(
      fields={**described.fields, **stated, **told},
      assumed=tuple(field for field in preprocessing.TOLD if field in assumed),
    )
    _config_of(described)
    return described, head_names.names_in(settings)
  except UserError:  # a ValueError, too
    raise
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    beside = settings.keys() - {'wanted'}
    what, advice = ('the config.json beside it', 'mend it, or remove it')
    if not beside:
      what, advice = ('the shapes of its arrays', 'give the checkpoint as it was published')
    raise UserError(f'{what} cannot be understood ({error}); {advice}') from None


def _config_of(described: Architecture):
  """Returns the `config.model` of an architecture."""
  model_config = config_lib.default().model
  model_config.name = described.name
  for field, value in described.fields.items():
    setattr(model_config, field, value)
  return model_config


@contextlib.contextmanager
def _naming(source: str | Path) -> Iterator[None]:
  """Says of which checkpoint a message is, where it does not say so itself."""
  try:
    yield
  except UserError as error:
    if str(source) in str(error):
      raise
    raise UserError(f'base.source {source}: {error}') from None


def load(
  source: str | Path,
  name: str | None = None,
  *,
  image_size: int | None = None,
  patch_size: int | None = None,
  num_classes: int | None = None,
  channels: int = 3,
  window: int | None = None,
  label_map: Sequence[int] = (),
  label_names: Sequence[str] = (),
  patch_resize: str = 'sum',
  mean: float | Sequence[float] = (),
  std: float | Sequence[float] = (),
  act: str = '',
) -> tuple[nn.Module, dict[str, Any], LoadReport]:
  """Loads a published checkpoint.

  Args:
    source: what `open_checkpoint` opens.
    name: name in the registry, or that of timm or transformers, checked against the checkpoint;
      None: the name that the checkpoint has in the registry.
    image_size: side of the images in pixels; None: that of its training.
    patch_size: side of a patch in pixels; None: its own.
    num_classes: K; None: rows of its head. Another number than that makes a new head, of zeros.
    channels: channels of the images, 3 or 1.
    window: side of a Swin's window in tokens; None: its own.
    label_map: row of the checkpoint's head for each class, -1 for a new one.
    label_names: the K classes of the data, by label: where the checkpoint names its classes too,
      the rows of its head are matched by name, also a few of many (docs/pretrained.md).
    patch_resize: 'sum', 'flexi' or 'interpolate' (resize.py).
    mean: what was subtracted from pixels in [0, 1], one number for each channel or one for all;
      (): what the files beside the weights say, or else the family's, which a warning says.
    std: what they were divided by.
    act: the activation, as in config.model.act.

  Returns:
    model: the linen module; `model.apply(variables, images)` gives the logits
      of images float32 [B, H, W, C] in [0, 1].
    variables: {'params': ...}, float32 numpy arrays.
    report: what became of every leaf.

  Raises:
    UserError: `open_checkpoint` refuses the source; the checkpoint is of another architecture than
      `name`; sizes do not fit; a key has no place or a leaf no array.
  """
  config: Any = config_lib.default()
  config.base.update(label_map=tuple(label_map), patch_resize=patch_resize)
  mean, std = (tuple(np.atleast_1d(values).tolist()) for values in (mean, std))
  config.base.update(mean=mean, std=std, act=act)
  told = preprocessing.told_of(config)
  if name:
    models.family(name)  # a wrong name is said before a download
    config.model.name = name
  opened = open_checkpoint(source, config.model if name else None, told)
  if not name:
    config.model = _config_of(opened.architecture)
  if patch_size:
    config.model.patch_size = patch_size
  if window:
    config.model.window = window
  configure(config.model, opened, explicit_patch=bool(patch_size))
  image_size = image_size or opened.architecture.image_size
  given = num_classes or len(label_map) or len(label_names)
  num_classes = given or opened.architecture.num_classes
  if label_names and len(label_names) != num_classes:
    raise UserError(f'{len(label_names)} label_names for {num_classes} classes; give one for each')
  with _naming(source):
    model, variables, report = _fill(opened, config, image_size, channels, num_classes, label_names)
  for line in report.assumptions():
    warn(f'{source}: {line}')
  return model, variables, report


def convert(
  config,
  opened: Opened,
  image_shape: tuple[int, int, int],
  num_classes: int,
  label_names: Sequence[str] = (),
) -> tuple[dict[str, Any], LoadReport]:
  """Brings an opened checkpoint to the model of `config`.

  Args:
    config: its `model` is configured in place; its `base` says how to resize.
    opened: the checkpoint, by `open_checkpoint`.
    image_shape: shape of the images, (H, W, C).
    num_classes: K.
    label_names: the K classes of the data, by label; (): rows go by their position.

  Returns:
    The parameters, and the report of the load.

  Raises:
    UserError: `load` would refuse it; the images are not square.
  """
  height, width, channels = image_shape
  if height != width:
    raise UserError(
      f'base.source: images of {height} x {width} are not square, as those of '
      f'{opened.identity["source"]} are'
    )
  configure(config.model, opened, explicit_patch=True)
  with _naming(opened.identity['source']):
    _, variables, report = _fill(opened, config, height, channels, num_classes, label_names)
  return variables['params'], report


def configure(model_config, opened: Opened, *, explicit_patch: bool) -> None:
  """Puts into `config.model` what the checkpoint decides, in place.

  Args:
    model_config: the `model` part of a config; its name says what is wanted.
    opened: the checkpoint.
    explicit_patch: whether to keep model_config.patch_size.

  Raises:
    UserError: the checkpoint is of another architecture.
  """
  described = opened.architecture
  wanted = dict(models.settings(model_config))
  found = models.settings(_config_of(described))
  same_family = models.family(model_config.name) is models.family(described.name)
  different = [
    field
    for field in _STRUCTURE
    if wanted.get(field) != found.get(field)
    # What the name leaves open, the checkpoint fills in.
    and (wanted.get(field) or field not in model_config)
  ]
  if different or not same_family:
    what = ', '.join(f'{f} {found.get(f)}' for f in different[:2])
    raise UserError(
      f'{opened.identity["source"]} holds a {described.name}'
      f'{f" ({what})" if what else ""}, not the {model_config.name} asked for; '
      f'set model.name to {described.name}, or give another source'
    )
  for field, value in described.fields.items():
    if field == 'patch_size' and explicit_patch:
      continue
    if not getattr(model_config, field) or field == 'patch_size':
      setattr(model_config, field, value)


def _fill(
  opened: Opened,
  config,
  image_size: int,
  channels: int,
  num_classes: int,
  label_names: Sequence[str],
) -> tuple[nn.Module, dict[str, Any], LoadReport]:
  """Builds the configured model of a config and fills it; see `load`."""
  model_config, label_map = config.model, tuple(config.base.label_map)
  _check_sizes(opened, model_config, image_size, num_classes, label_map)
  settings = models.settings(model_config)
  mean, std = models.normalisation(model_config)
  model = models.create(model_config, num_classes)
  count = max(len(mean), len(std))
  if channels != 1 and count not in (1, channels):
    raise UserError(
      f'images of {channels} channels, where its normalisation is of {count}; give images of '
      f'{count} channels, or of 1'
    )
  shape = (1, image_size, image_size, channels)
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
  flat = traverse_util.flatten_dict(shapes, sep='/')
  leaves = {path: leaf.shape for path, leaf in flat.items()}
  source, own = opened.identity['source'], opened.architecture.num_classes
  head = head_names.find(source, opened.label_names, own, label_names, label_map, num_classes)
  if head.doubtful:
    warn(head.said)
  filler = Filler(opened, model, leaves, head.label_map, config.base.patch_resize)
  params, rows = filler.fill()
  report = LoadReport(
    name=model_config.name,
    layout=opened.layout.name,
    identity=opened.identity,
    image_size=image_size,
    patch_size=model_config.patch_size,
    mean=mean,
    std=std,
    model=model_config.to_dict(),
    rows=tuple(rows),
    label_names=head.label_names,
    label_map=head.label_map,
    labels=head.said,
    doubtful=head.doubtful,
    assumed=tuple((field, settings[field]) for field in opened.architecture.assumed),
  )
  variables = {'params': traverse_util.unflatten_dict(params, sep='/')}
  return model, variables, report


def _check_sizes(opened, model_config, image_size, num_classes, label_map):
  patch = model_config.patch_size
  if patch < 1 or image_size < patch or image_size % patch:
    raise UserError(
      f'image size {image_size} is not a multiple of the patch size {patch} of '
      f'{opened.identity["source"]}; change one of them'
    )
  if not num_classes:
    raise UserError(
      f'{opened.identity["source"]} has no head: say how many classes there are (num_classes)'
    )
  if num_classes < 0:
    raise UserError(f'num_classes {num_classes}: there must be at least 1')
  if label_map and len(label_map) != num_classes:
    raise UserError(
      f'base.label_map has {len(label_map)} rows for {num_classes} classes; '
      'give one for each, -1 for a new one'
    )


def _open_artefact(path: Path) -> Opened:
  """Opens a run of ours: its paths are the model's own."""
  params, metadata = artefact_lib.load_base(path)
  tensors = traverse_util.flatten_dict(params, sep='/')
  shapes = {key: tuple(array.shape) for key, array in tensors.items()}
  saved = config_lib.from_mapping(metadata['config']).model
  fields = {
    field: value
    for field, value in saved.to_dict().items()
    if field not in ('name', 'dropout', 'dtype') and value not in (None, '', ())
  }
  described = Architecture(saved.name, fields, metadata['image_shape'][0], metadata['num_classes'])
  layout = Layout('fulllora_jax run', lambda _: True, lambda *_: described, (Rule(r'(.*)', r'\1'),))
  identity = {'source': str(path), 'revision': None, 'files': {}}
  names = tuple((name,) for name in metadata.get('label_names') or ())
  return Opened(tensors, shapes, layout, described, identity, names)
