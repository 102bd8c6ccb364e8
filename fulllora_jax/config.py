"""The experiment configuration: every field, its unit and its source.

A config holds numbers, strings, booleans and tuples only; code builds the
objects. `default` is the protocol of Mo et al. (NeurIPS 2022), which FullLoRA
(arXiv 2401.01752) inherits; files in configs/ change what differs.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from fulllora_jax.core.errors import UserError

ConfigDict = config_dict.ConfigDict
WEIGHTS = ('base', 'best', 'last')  # of a run


def default() -> ConfigDict:
  """Returns the configuration of the inherited protocol, CIFAR-10 on ViT-B."""
  c = ConfigDict()
  c.name = 'cifar10'  # names the report and the default work directory
  c.seed = 0  # every random number of the run follows from it
  # fulllora | lnlora | lora | lora_everywhere | adapter | adaptformer | vpt |
  # bias | layernorm | linear | full | standard (adapters/methods.py)
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
  # Memory for time: none | blocks (recompute each) | dots (keep what linear
  # maps gave). It changes no number.
  m.remat = 'none'
  # '': cuDNN's fused kernel in bfloat16 on a GPU, XLA elsewhere; xla | cudnn.
  m.attention = ''
  m.dropout = 0.0  # training forward only, never in an attack
  m.dtype = 'float32'  # compute: float32 | bfloat16; attack state is float32

  c.adapter = a = ConfigDict()
  # Roles of the model's LINEAR_MAPS, or regular expressions of module paths;
  # (): the method's own (docs/methods.md), in fulllora all roles but the head.
  a.targets = ()
  a.rank = 24  # 4.9 % of ViT-B; 1..min(d_in, d_out)
  a.alpha = 24.0  # the branch is scaled by alpha / rank
  a.layer_norm = True  # False: plain LoRA
  a.epsilon = 1e-6  # of the LayerNorm
  # For one target: 'patch_embed.layer_norm=False', 'query.rank=4', ... Those
  # of a role that the method does not adapt have no effect.
  a.overrides = ()
  a.prompts = 10  # vpt: learned tokens for each block
  a.head = 'train'  # train (in full) | frozen | lnlora
  a.dtype = 'float32'  # of the adapter's parameters

  c.data = d = ConfigDict()
  d.name = 'cifar10'  # a tfds name, or folder:/path/to/images
  d.dir = ''  # '': $TFDS_DATA_DIR, then ~/tensorflow_datasets
  d.image_size = 32  # pixels; other images are resized and centre-cropped
  d.train_split = 'train'
  d.test_split = ''  # '': test, or validation where there is no test
  d.validation_fraction = 0.02  # of the train split, held out
  d.seed = config_dict.placeholder(int)  # of what is held out; None: seed
  d.cache = 'auto'  # memory | stream | auto (memory up to 4 GiB)
  d.on_broken = 'refuse'  # an unreadable image of a folder: refuse | skip
  d.prepare = True  # prepare (download) a missing set on first use

  c.threat = t = ConfigDict()
  t.norm = 'linf'  # linf | l2, in [0, 1] pixels; evaluations know l1 too
  t.eps = '8/255'

  c.attack = k = ConfigDict()  # the inner maximisation
  # pgd | fgsm_rs | n_fgsm: the last two, for linf, make one step of a size of
  # their own from a random start, whatever steps and step_size say
  # (attacks/single_step.py).
  k.name = 'pgd'
  k.steps = 10
  k.step_size = '2/255'
  k.loss = 'ce'  # ce | margin | dlr
  k.random_start = True
  k.restarts = 1
  k.eps_warmup = 0.0  # fraction of training over which eps rises from 0
  # Fraction of training over which the number of steps rises from 1; while n
  # are made, their size is at least 1.25 eps / n (inner_attack.py).
  k.rise = 0.0
  # Steps a misclassified image no further (attacks/early_stop.py).
  k.early_stop = False
  # Begins at the end of the attack on the same example an epoch before, in
  # place of a random point, cropped and flipped as the example is; for linf.
  # N x H x W x C bytes on every device.
  k.carry = False
  # Fraction of training over which what an attack may use rises to all of it:
  # the attention's gradient (ARD), the patches (PRM); 0: off (ard_prm.py).
  k.ard = 0.0
  k.prm = 0.0

  c.objective = j = ConfigDict()  # the outer loss (objectives.py)
  # pgd_at | trades | mart; the last two bring a start of the attack, trades a
  # loss of it too.
  j.name = 'pgd_at'
  j.beta = 6.0  # trades, mart: weight of the divergence
  j.label_smoothing = 0.0  # of the cross entropy; not of mart

  c.awp = ConfigDict()  # weights perturbed before each gradient (awp.py)
  c.awp.gamma = 0.0  # relative to each leaf's norm, e.g. 0.005; 0: off
  c.awp.warmup = 0.0  # fraction of training before it starts

  c.ema = ConfigDict()  # of the leaves that learn: validated and published
  c.ema.decay = 0.0  # e.g. 0.999; 0: off

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
  c.train.max_skipped = 10  # steps with a NaN loss or gradient, then stop

  c.mesh = ConfigDict()
  c.mesh.fsdp = 1  # devices that share one copy of the frozen base
  c.mesh.shard_from = 2**18  # elements; smaller arrays are copied to all

  c.base = b = ConfigDict()
  # train: first train it here by method `standard`, with what follows;
  # scratch: no base (methods full and standard); a run's work directory; or a
  # published checkpoint: a file or folder, hf-hub:owner/name[@revision], or
  # https://...#sha256=... (pretrained/sources.py).
  b.source = 'train'
  # Of the frozen kernels in memory: float32 | bfloat16, which needs model.dtype
  # bfloat16 and changes no number (each call would cast them anyway).
  b.dtype = 'float32'
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
  e.weights = ()  # of base, best, last; (): all there are
  e.step_size = '2/255'
  e.restarts = 1
  e.batch_size = 256
  e.num_examples = 0  # of the test split, chosen by the seed; 0: all
  e.validation_attack = 'pgd-10'
  e.validation_examples = 1000  # at most; 0: all
  # Attacks a few hundred more images for report.html: what follows, the most
  # and least robust images, and what the adapter changed.
  e.closer_look = True
  # Multiples of eps at which report.html shows robust accuracy, by the
  # validation attack on 256 test images at most; (): not at all.
  e.radii = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

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
  # What else belongs to the main run alone.
  for part in ('objective', 'awp', 'ema'):
    base[part] = ConfigDict(default()[part].to_dict())
  base.attack.update(carry=False, ard=0.0, prm=0.0)
  base.base.source = 'scratch'
  base.eval.attacks = ('clean',)
  base.eval.validation_attack = 'clean'
  return base
