"""The experiment configuration: every field, its unit and its source.

A config holds numbers, strings, booleans and tuples only; code builds the
objects. `default` is the protocol of Mo et al. (NeurIPS 2022), which FullLoRA
(arXiv 2401.01752) inherits; files in configs/ change what differs.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from fulllora_jax import attacks, models, optim
from fulllora_jax.adapters import methods
from fulllora_jax.attacks.losses import LOSSES
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.console import warn
from fulllora_jax.errors import UserError

ConfigDict = config_dict.ConfigDict


def default() -> ConfigDict:
  """Returns the configuration of the inherited protocol, CIFAR-10 on ViT-B."""
  c = ConfigDict()
  c.name = 'cifar10'  # names the report and the default work directory
  c.seed = 0  # every random number of the run follows from it
  # fulllora | lora | linear | full | standard (adapters/methods.py)
  c.method = 'fulllora'

  c.model = m = ConfigDict()
  # vit_{ti,s,b,l,h}, deit_*, swin_*, ... (models/__init__.py); vit, deit, ...
  # without a size take it from the fields below.
  m.name = 'vit_b'
  m.width = config_dict.placeholder(int)  # overrides of the name's size
  m.depth = config_dict.placeholder(int)
  m.num_heads = config_dict.placeholder(int)
  m.mlp_dim = config_dict.placeholder(int)
  m.depths = ()  # swin: blocks of each stage
  m.heads = ()  # swin: heads of each stage
  m.window = config_dict.placeholder(int)  # swin: side of a window, in tokens
  m.local_layers = config_dict.placeholder(int)  # convit: blocks with GPSA
  m.patch_size = 4  # pixels
  # What follows is the name's, or the checkpoint's, where it is not set.
  m.pool = ''  # token | mean | mean_norm | token_mean | map (models/vit.py)
  m.class_token = config_dict.placeholder(bool)
  m.swiglu = config_dict.placeholder(bool)  # gated MLPs
  m.act = ''  # gelu (exact) | gelu_tanh | quick_gelu
  m.epsilon = config_dict.placeholder(float)  # of the model's own norms
  m.mean = ()  # normalisation (x - mean) / std of [0, 1] pixels,
  m.std = ()  # one value for each channel, or one for all
  m.dropout = 0.0  # training forward only, never in an attack
  m.dtype = 'float32'  # compute: float32 | bfloat16; attack state is float32

  c.adapter = a = ConfigDict()
  # Roles of the model's LINEAR_MAPS, or regular expressions of module paths;
  # (): all roles but the head.
  a.targets = ()
  a.rank = 24  # 4.9 % of ViT-B; 1..min(d_in, d_out)
  a.alpha = 24.0  # the branch is scaled by alpha / rank
  a.layer_norm = True  # False: plain LoRA
  a.epsilon = 1e-6  # of the LayerNorm
  # For one target: 'patch_embed.layer_norm=False', 'query.rank=4', ...
  a.overrides = ()
  a.head = 'train'  # train (in full) | frozen | lnlora
  a.dtype = 'float32'  # of the adapter's parameters

  c.data = d = ConfigDict()
  d.name = 'cifar10'  # a tfds name, or folder:/path/to/images
  d.dir = ''  # '': $TFDS_DATA_DIR, then ~/tensorflow_datasets
  d.image_size = 32  # pixels; other images are resized and centre-cropped
  d.train_split = 'train'
  d.test_split = ''  # '': test, or validation where there is no test
  d.validation_fraction = 0.02  # of the train split, held out
  d.cache = 'auto'  # memory | stream | auto (memory up to 4 GiB)
  d.on_broken = 'refuse'  # an unreadable image of a folder: refuse | skip
  d.prepare = True  # prepare (download) a missing set on first use

  c.threat = t = ConfigDict()
  t.norm = 'linf'  # linf | l2, in [0, 1] pixels; evaluations know l1 too
  t.eps = '8/255'

  c.attack = k = ConfigDict()  # the inner maximisation
  k.steps = 10
  k.step_size = '2/255'
  k.loss = 'ce'  # ce | margin | dlr
  k.random_start = True
  k.restarts = 1
  k.eps_warmup = 0.0  # fraction of training over which eps rises from 0

  c.augment = u = ConfigDict()  # on the device, before the attack
  u.crop_padding = 4  # pixels of zeros; 0: no crop
  u.flip = True
  u.mixup = 0.8  # Beta parameter; 0: off
  u.cutmix = 1.0
  u.mix_probability = 0.3  # of mixing a batch, by mixup or cutmix

  c.optimizer = sgd()
  c.schedule = step_decay()
  c.train = ConfigDict()
  c.train.epochs = 40.0
  c.train.steps = config_dict.placeholder(int)  # instead of epochs
  c.train.batch_size = 64  # global, whatever the number of devices
  c.train.accumulate = 1  # microbatches a step, to save memory
  c.train.log_every = 50  # steps
  c.train.eval_every = 1000  # steps; validation, which chooses `best`
  c.train.checkpoint_every = 500  # steps
  c.train.keep = 3  # newest training checkpoints kept

  c.base = b = ConfigDict()
  # train: first train it here by method `standard`, with what follows;
  # scratch: no base (methods full and standard); a run's work directory; or a
  # published checkpoint: a file or folder, hf-hub:owner/name[@revision], or
  # https://...#sha256=... (pretrained/sources.py).
  b.source = 'train'
  b.patch_resize = 'sum'  # to another patch size: sum | flexi | interpolate
  # Row of a published head for each class, -1 for a new one; (): a new head
  # unless there are as many classes.
  b.label_map = ()
  b.optimizer = adamw(learning_rate=1e-3, weight_decay=0.05)
  b.schedule = cosine(warmup=0.05)
  b.augment = ConfigDict(u.to_dict())
  b.train = ConfigDict(c.train.to_dict())
  b.train.epochs = 100.0
  b.train.batch_size = 512

  c.eval = e = ConfigDict()
  # name[-steps]; autoattack and its attacks too (attacks/named.py)
  e.attacks = ('clean', 'fgsm', 'pgd-20', 'cw_linf-20')
  e.step_size = '2/255'
  e.restarts = 1
  e.batch_size = 256
  e.num_examples = 0  # of the test split, chosen by the seed; 0: all
  e.validation_attack = 'pgd-10'
  e.validation_examples = 1000  # at most; 0: all

  c.log = ConfigDict()
  c.log.tensorboard = True  # event files, where clu and TensorFlow are there
  return c


def sgd(learning_rate: float = 0.1, weight_decay: float = 1e-4) -> ConfigDict:
  """SGD as in Mo et al.: momentum 0.9, decay 1e-4, gradient clip 1.0."""
  return _optimizer('sgd', learning_rate, weight_decay)


def adamw(learning_rate: float, weight_decay: float = 1e-4) -> ConfigDict:
  """AdamW with decoupled weight decay (Loshchilov & Hutter, 2019)."""
  return _optimizer('adamw', learning_rate, weight_decay)


def _optimizer(name, learning_rate, weight_decay):
  o = ConfigDict()
  o.name = name  # sgd | adamw
  o.learning_rate = float(learning_rate)
  o.weight_decay = float(weight_decay)
  o.momentum = 0.9  # sgd
  o.b1 = 0.9  # adamw
  o.b2 = 0.999  # adamw
  o.clip = 1.0  # global norm of the trainable gradient; 0: off
  return o


def step_decay() -> ConfigDict:
  """Mo et al.: of 40 epochs, x0.1 for the last 5, x0.01 for the last 2."""
  return _schedule('step', 0.0)


def cosine(warmup: float = 0.0) -> ConfigDict:
  """Cosine to zero after a linear warm-up."""
  return _schedule('cosine', warmup)


def _schedule(name, warmup):
  s = ConfigDict()
  s.name = name  # constant | step | cosine
  s.warmup = float(warmup)  # fraction of training, lr rises from 0
  s.boundaries = (35 / 40, 38 / 40)  # step: fractions of training, and
  s.factors = (0.1, 0.01)  # the factor of the learning rate after each
  return s


def copy(config: ConfigDict) -> ConfigDict:
  """Returns a config of its own, that can be changed."""
  return from_mapping(as_plain(config))


def to_json(config: ConfigDict) -> str:
  """Writes a config as JSON text, keys sorted; tuples become lists."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def as_plain(config: ConfigDict) -> dict[str, Any]:
  """Returns a config as plain dicts, lists, numbers and strings."""
  return json.loads(to_json(config))


def from_mapping(values: Mapping[str, Any]) -> ConfigDict:
  """Reads back what `to_json` wrote, strictly.

  Raises:
    UserError: if a field is unknown here, naming it, or of another type.
  """
  config = default()
  try:
    _fill(config, values, '')
  except (AttributeError, TypeError) as error:
    raise UserError(f'saved config: it is damaged ({error})') from None
  return config


def _fill(config: ConfigDict, values: Mapping[str, Any], prefix: str) -> None:
  for key, value in values.items():
    if key not in config:
      raise UserError(
        f'saved config: unknown field {prefix}{key}; it was written by '
        'another version of fulllora_jax'
      )
    if isinstance(value, Mapping):
      _fill(config[key], value, f'{prefix}{key}.')
    else:
      config[key] = tuple(value) if isinstance(value, list) else value


def flat(config: ConfigDict) -> dict[str, Any]:
  """Flattens to {'train.steps': 100, ...}, for comparing and printing."""
  items = {}
  for key, value in as_plain(config).items():
    _flatten(key, value, items)
  return items


def _flatten(prefix, value, items):
  if isinstance(value, dict):
    for key, inner in value.items():
      _flatten(f'{prefix}.{key}', inner, items)
  else:
    items[prefix] = value


def base_config(config: ConfigDict) -> ConfigDict:
  """Returns the config of the standard training that makes the base.

  Same model, data and seed; method `standard` with the recipe of
  `config.base`; evaluated on clean images only, since the main run evaluates
  the base under every attack.
  """
  base = ConfigDict(config.to_dict())
  base.name = f'{config.name}-base'
  base.method = 'standard'
  for part in ('optimizer', 'schedule', 'augment', 'train'):
    base[part] = ConfigDict(config.base[part].to_dict())
  base.base.source = 'scratch'
  base.eval.attacks = ('clean',)
  base.eval.validation_attack = 'clean'
  return base


def threat(config: ConfigDict) -> attacks.Threat:
  """Returns the threat model of `config.threat`."""
  return attacks.Threat(norm=config.threat.norm, eps=config.threat.eps)


def evaluation_attacks(config: ConfigDict) -> list[attacks.Attack]:
  """Returns the attacks of `config.eval`."""
  return [evaluation_attack(config, text) for text in config.eval.attacks]


def picture_attack(chosen: list[attacks.Attack]) -> attacks.Attack | None:
  """Returns the attack that a report's picture shows: of most steps."""
  single = [attack for attack in chosen if not attack.version]
  return max(single, key=lambda attack: attack.steps, default=None)


def evaluation_attack(config: ConfigDict, text: str) -> attacks.Attack:
  """Returns one attack, with the step size and restarts of `config.eval`."""
  step_size = parse_fraction(config.eval.step_size, 'eval.step_size')
  return attacks.parse(text, threat(config), step_size, config.eval.restarts)


def validate(config: ConfigDict, num_devices: int) -> None:
  """Checks what can be known before data is read or anything compiled.

  Warns on stderr where the image makes fewer than 16 tokens.

  Raises:
    UserError: at the first field that is wrong, with its name.
  """
  method = methods.get(config.method)
  models.linear_maps(config.model.name)
  if config.base.source in ('train', 'scratch'):  # nothing else settles it
    models.create(config.model, num_classes=2)
  if config.threat.norm == 'l1':
    raise UserError(
      'threat.norm l1: training knows linf and l2 only; evaluate knows l1'
    )
  validate_evaluation(config)
  refuse_rand(config)
  validation = evaluation_attack(config, config.eval.validation_attack)
  if validation.version:
    raise UserError(
      f'eval.validation_attack {validation.label}: an ensemble takes too long '
      'to choose among checkpoints; give pgd-10'
    )
  if method.branch:
    methods.branches(
      config.adapter, method, models.linear_maps(config.model.name)
    )
  if config.base.source == 'scratch' and method.trains_less_than_all():
    raise UserError(
      f'base.source scratch: method {config.method} freezes a base, so it '
      'needs one; give train, or the work directory of a run'
    )
  choose('adapter.head', config.adapter.head, ('train', 'frozen', 'lnlora'))
  choose('model.dtype', config.model.dtype, ('float32', 'bfloat16'))
  choose('adapter.dtype', config.adapter.dtype, ('float32', 'bfloat16'))
  resizes = ('sum', 'flexi', 'interpolate')
  choose('base.patch_resize', config.base.patch_resize, resizes)
  choose('attack.loss', config.attack.loss, tuple(LOSSES))
  choose('data.cache', config.data.cache, ('auto', 'memory', 'stream'))
  choose('data.on_broken', config.data.on_broken, ('refuse', 'skip'))
  if config.adapter.rank < 1:
    raise UserError(
      f'adapter.rank {config.adapter.rank}: it must be in 1..min(d_in, d_out) '
      'of every target'
    )
  _check_attack(config)
  _check_patches(config)
  _check_recipe('', config, num_devices)
  if config.base.source == 'train':
    _check_recipe('base.', config.base, num_devices)


def validate_evaluation(config: ConfigDict) -> None:
  """Checks `config.threat` and `config.eval`; raises UserError."""
  ensembles = any(attack.version for attack in evaluation_attacks(config))
  if ensembles and not threat(config).eps:
    raise UserError(
      f'threat.eps {config.threat.eps}: leaves nothing to attack; that is the '
      'clean accuracy'
    )
  _positive('eval.batch_size', config.eval.batch_size)
  step_size = parse_fraction(config.eval.step_size, 'eval.step_size')
  _positive('eval.step_size', step_size)
  for field in ('num_examples', 'validation_examples'):
    if config.eval[field] < 0:
      raise UserError(
        f'eval.{field} {config.eval[field]}: give 0 for all, or a number'
      )


def refuse_rand(config: ConfigDict) -> None:
  """Raises UserError for an attack on noise that our models do not have."""
  for attack in evaluation_attacks(config):
    if attack.version == 'rand':
      raise UserError(
        f'attack: {attack.label} is for stochastic models, and this one always '
        'answers the same; give autoattack'
      )


def choose(name: str, value: str, known: tuple[str, ...]) -> None:
  """Raises UserError unless the field's value is one of the known."""
  if value not in known:
    raise UserError(f'{name}: unknown {value!r}; known: {", ".join(known)}')


def _positive(name: str, value: float) -> None:
  if not value > 0:
    raise UserError(f'{name} {value}: it must be above 0')


def _fraction(name: str, value: float) -> None:
  if not 0 <= value <= 1:
    raise UserError(f'{name} {value}: it must be in 0..1')


def _check_attack(config: ConfigDict) -> None:
  step_size = parse_fraction(config.attack.step_size, 'attack.step_size')
  _positive('attack.step_size', step_size)
  _positive('attack.steps', config.attack.steps)
  _positive('attack.restarts', config.attack.restarts)
  _fraction('attack.eps_warmup', config.attack.eps_warmup)
  eps = threat(config).eps
  if step_size > 2 * eps > 0:
    warn(
      f'attack.step_size {config.attack.step_size} is over twice threat.eps '
      f'{config.threat.eps}: every step jumps across the whole ball'
    )
  if abs(eps * 255 - round(eps * 255)) > 1e-6 and 0.03 <= eps <= 0.032:
    warn(f'threat.eps {config.threat.eps} is not 8/255; write 8/255 if meant')


def _check_patches(config: ConfigDict) -> None:
  image, patch = config.data.image_size, config.model.patch_size
  _positive('model.patch_size', patch)
  if image % patch or image < patch:
    raise UserError(
      f'model.patch_size {patch} does not divide data.image_size {image}; '
      'change one of them'
    )
  tokens = (image // patch) ** 2
  if tokens < 16:
    warn(
      f'model.patch_size {patch} at data.image_size {image} makes only '
      f'{tokens} tokens; below 16 a ViT learns badly, use a smaller patch'
    )


def _check_recipe(prefix: str, recipe: ConfigDict, num_devices: int) -> None:
  """Checks the optimizer, schedule, augmentation and loop of one training."""
  train, schedule, augment = recipe.train, recipe.schedule, recipe.augment
  choose(f'{prefix}optimizer.name', recipe.optimizer.name, optim.OPTIMIZERS)
  choose(f'{prefix}schedule.name', schedule.name, optim.SCHEDULES)
  _positive(f'{prefix}optimizer.learning_rate', recipe.optimizer.learning_rate)
  _fraction(f'{prefix}schedule.warmup', schedule.warmup)
  _fraction(f'{prefix}augment.mix_probability', augment.mix_probability)
  boundaries = list(schedule.boundaries)
  if schedule.name == 'step' and (
    len(boundaries) != len(schedule.factors)
    or boundaries != sorted(boundaries)
    or any(not schedule.warmup < b <= 1 for b in boundaries)
  ):
    raise UserError(
      f'{prefix}schedule.boundaries {tuple(boundaries)}: they must rise from '
      f'schedule.warmup to 1, one for each of schedule.factors '
      f'{tuple(schedule.factors)}'
    )
  for field in (
    'batch_size', 'accumulate', 'log_every', 'eval_every',
    'checkpoint_every', 'keep',
  ):  # fmt: skip
    _positive(f'{prefix}train.{field}', train[field])
  if train.steps is None:
    _positive(f'{prefix}train.epochs', train.epochs)
  else:
    _positive(f'{prefix}train.steps', train.steps)
  if train.batch_size % (train.accumulate * num_devices):
    raise UserError(
      f'{prefix}train.batch_size {train.batch_size} does not divide into '
      f'train.accumulate {train.accumulate} microbatches over {num_devices} '
      f'devices; use a multiple of {train.accumulate * num_devices}'
    )
