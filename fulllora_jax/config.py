"""The experiment configuration: every field, its unit and its source.

A config holds numbers, strings, booleans and tuples only; code builds the
objects. `default` is the protocol of Mo et al. (NeurIPS 2022), which FullLoRA
(arXiv 2401.01752) inherits; files in configs/ change what differs.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict
from ml_collections.config_dict import ConfigDict

from fulllora_jax.core.errors import UserError
from fulllora_jax.core.recipe import adamw, augmentation, cosine, loop, sgd, step_decay

WEIGHTS = ('base', 'best', 'last')  # the sets of weights that a run leaves
PROBES = ('probe', 'adversarial_probe')  # the head's own trainings (training/head.py)
HEAD_STARTS = ('', 'zeros', 'rows', *PROBES)  # what config.head.start says; else it is a place
# Fields of `eval` that say what is measured beside its attacks (evaluation/measurements.py)
BESIDE = ('expected', 'certify', 'union', 'dial', 'corruptions', 'shifts')
# Fields of earlier versions, and the value with which each did nothing. What
# they did was measured and left out (docs/road.md).
_REMOVED = {'attack.rise': 0.0, 'attack.early_stop': False}
# Fields of earlier versions that have another name and are text now.
_RENAMED = {'attack.eps_warmup': 'eps_full'}


def default() -> ConfigDict:
  """Returns the configuration of the inherited protocol, CIFAR-10 on ViT-B."""
  config = ConfigDict()
  config.name = 'cifar10'  # names the report and the default work directory
  config.seed = 0  # every random number of the run follows from it; 0..2^32-1
  # What learns: a method of docs/methods.md (adapters/methods.py), e.g.
  # fulllora, lnlora, lora, adapter, vpt, bias, linear, full or standard.
  config.method = 'fulllora'
  config.model = _model()
  config.adapter = _adapter()
  config.data = _data()

  config.threat = threat = ConfigDict()
  # The ball around an image: linf | l2 | l1.
  threat.norm = 'linf'
  # The radius of the ball in pixels of [0, 1], a number or a fraction as text;
  # at least 0, for linf at most 1.
  threat.eps = '8/255'
  # Several threats to train for at once, as linf:8/255,l2:0.5,l1:12, the one above among them: each
  # batch is attacked in one, the more often the less it is withstood, with steps that are the same
  # share of its eps (training/turns.py); '': the one above alone.
  threat.union = ''

  config.attack = _attack()
  config.objective = objective = ConfigDict()  # the outer loss
  # pgd_at | trades | mart; the last two start the attack near the image, and
  # trades gives it a loss of its own (training/objectives.py).
  objective.name = 'pgd_at'
  objective.beta = 6.0  # trades, mart: weight of the divergence, at least 0
  # The share of each label that the cross entropy spreads over all classes, in
  # [0, 1); 0: off. Not for mart.
  objective.label_smoothing = 0.0

  # Weights are perturbed before each gradient is taken (training/awp.py).
  config.awp = awp = ConfigDict()
  # The size relative to each leaf's norm, in [0, 1), such as 0.005; 0: off.
  awp.gamma = 0.0
  awp.warmup = 0.0  # fraction of training before it starts, in [0, 1)

  # The average of the leaves that learn, which is then validated and published.
  config.ema = ema = ConfigDict()
  ema.decay = 0.0  # share that a step keeps, in [0, 1), such as 0.999; 0: off

  config.augment = augmentation()
  config.optimizer = sgd()
  config.schedule = step_decay()
  config.train = loop(epochs=40.0, batch_size=64)
  config.mesh = mesh = ConfigDict()
  # How many devices share one copy of the frozen base, at least 1; divides their number.
  mesh.fsdp = 1
  mesh.shard_from = 2**18  # arrays of fewer elements, at least 0, are copied to all devices
  config.base = _base()
  config.head = _head()
  config.eval = _eval()
  config.log = log = ConfigDict()
  log.tensorboard = True  # event files, where clu and TensorFlow are installed
  return config


def _model() -> ConfigDict:
  model = ConfigDict()
  # vit_{ti,s,b,l,h}, deit_*, swin_*, ... (models/__init__.py), or a name of timm
  # or of the hub, as vit_tiny_patch16_224 or google/vit-base-patch16-224; vit,
  # deit, swin and convit have no size and take it from the fields below.
  model.name = 'vit_b'
  # The size of the model, all above 0; None: that of its name.
  model.width = config_dict.placeholder(int)  # length of a token
  model.depth = config_dict.placeholder(int)  # number of blocks
  model.num_heads = config_dict.placeholder(int)  # divides the width
  model.mlp_dim = config_dict.placeholder(int)  # hidden width of the MLPs
  model.depths = ()  # swin: number of blocks of each stage
  model.heads = ()  # swin: number of heads of each stage
  model.window = config_dict.placeholder(int)  # swin: side in tokens
  # convit: how many first blocks have gated positional self-attention, at least 0.
  model.local_layers = config_dict.placeholder(int)
  model.patch_size = 4  # side in pixels, above 0; divides data.image_size
  # Where the following are empty or None, the name or the checkpoint decides.
  # How tokens become one vector: token | mean | mean_norm | token_mean | map.
  model.pool = ''
  model.class_token = config_dict.placeholder(bool)  # whether there is one
  model.swiglu = config_dict.placeholder(bool)  # whether the MLPs are gated
  model.act = ''  # gelu (exact) | gelu_tanh | quick_gelu
  # Added to the variance in the model's own norms, above 0.
  model.epsilon = config_dict.placeholder(float)
  # Pixels of [0, 1] are normalised as (x - mean) / std, with one value for each
  # channel or one for all; std is above 0.
  model.mean = ()
  model.std = ()
  # What the backward pass computes again to save memory: none | blocks | dots
  # (all but the outputs of linear maps). It changes no number.
  model.remat = 'none'
  # How attention is computed: '' (cuDNN's fused kernel in bfloat16 on a GPU,
  # XLA elsewhere) | xla | cudnn.
  model.attention = ''
  # The probability with which the training forward pass drops an activation,
  # in [0, 1); an attack drops none.
  model.dropout = 0.0
  # What is computed in: float32 | bfloat16; attacked images are float32.
  model.dtype = 'float32'
  return model


def _adapter() -> ConfigDict:
  adapter = ConfigDict()
  # Which linear maps get a branch: roles of the model's LINEAR_MAPS, or regular expressions of
  # module paths. (): what the method says (docs/methods.md); in fulllora all roles but the head.
  adapter.targets = ()
  adapter.rank = 24  # 1..min(d_in, d_out) of each map; 24 is 4.9 % of ViT-B
  adapter.alpha = 24.0  # above 0; a branch is multiplied by alpha / rank
  adapter.layer_norm = True  # of a branch's input; False: plain LoRA
  adapter.epsilon = 1e-6  # added to the variance in that norm, above 0
  # Fields of one target that differ: 'patch_embed.layer_norm=False',
  # 'query.rank=4', ...; without effect for roles that the method leaves alone.
  adapter.overrides = ()
  adapter.prompts = 10  # vpt: learned tokens for each block, at least 1
  # The classification head: train (all of it) | frozen | lnlora (a branch).
  adapter.head = 'train'
  adapter.dtype = 'float32'  # of the adapter's parameters: float32 | bfloat16
  return adapter


def _data() -> ConfigDict:
  data = ConfigDict()
  data.name = 'cifar10'  # a data set of tfds, or folder:/path/to/images
  data.dir = ''  # of data sets; '': $TFDS_DATA_DIR, then ~/tensorflow_datasets
  # The side of the square images in pixels, above 0; images of another size are resized
  # and cropped around their centre.
  data.image_size = 32
  data.train_split = 'train'
  data.test_split = ''  # '': test, or validation where there is no test
  data.validation_fraction = 0.02  # of the train split, held out; in (0, 1)
  # Chooses the images that are held out, 0..2^32-1; None: config.seed.
  data.seed = config_dict.placeholder(int)
  # Where decoded images are kept: memory | stream (nowhere) | auto (memory up to 4 GiB).
  data.cache = 'auto'
  data.on_broken = 'refuse'  # an unreadable image of a folder: refuse | skip
  data.prepare = True  # whether to download and prepare a set that is missing
  return data


def _attack() -> ConfigDict:
  """The inner maximisation: the attack that is trained against."""
  attack = ConfigDict()
  # pgd | fgsm_rs | n_fgsm. The last two, for linf, make one step of a size of their own from a
  # random start, whatever steps and step_size say (attacks/single_step.py).
  attack.name = 'pgd'
  attack.steps = 10  # at least 1
  # In pixels of [0, 1], a number or a fraction as text, above 0.
  attack.step_size = '2/255'
  attack.loss = 'ce'  # what the attack raises: ce | margin | dlr
  attack.random_start = True  # False: PGD starts at the image
  attack.restarts = 1  # starts of PGD, at least 1; the strongest end is kept
  # The two hinges, fractions of training in [0, 1], such as '0.25' or '12/50': eps is 0 up to
  # eps_start, which trains on clean images alone, rises linearly, and is full from eps_full on.
  # eps_start may be 'auto': where clean validation accuracy has come to 90 % of where it seems to
  # end, and by half of eps_full (training/clean_phase.py).
  attack.eps_start = '0'
  attack.eps_full = '0'
  # Whether to begin where the attack on the same example ended an epoch before, cropped and flipped
  # as the example is; for linf. It takes N x H x W x C bytes on every device (training/carry.py).
  attack.carry = False
  # The fraction of training over which what the attack may use rises to all, in [0, 1]; 0: off.
  # ard: the gradient through attention; prm: the patches (training/ard_prm.py).
  attack.ard = 0.0
  attack.prm = 0.0
  # What follows where the model is seen to withstand this attack and no other (docs/road.md):
  # warn: a line, and it goes on; stop: the training ends, and `best` is from before it; strengthen:
  # it goes on from the last validation without a sign of it, or from the start, with PGD of twice
  # the steps, four at least, and so again; ten steps and more are let be with a line.
  attack.on_overfitting = 'warn'
  return attack


def _base() -> ConfigDict:
  """The frozen model beneath the adapter, and how to train it where needed."""
  base = ConfigDict()
  # train: it is trained first, by method `standard` and the recipe below; scratch: there is none
  # (methods full and standard); the work directory of a run; or a published checkpoint: a file or
  # folder, hf-hub:owner/name[@revision], or https://...#sha256=... (pretrained/).
  base.source = 'train'
  # Of the frozen kernels in memory: float32 | bfloat16, which needs model.dtype
  # bfloat16 and changes no number, for each call would cast them anyway.
  base.dtype = 'float32'
  base.patch_resize = 'sum'  # to another patch size: sum | flexi | interpolate
  # The row of the published head for each class, -1 for a new one; (): all rows
  # where there are as many classes, and else a new head.
  base.label_map = ()
  # How a published checkpoint was trained, where the files beside it do not say so; they go before
  # what those say. Pixels of [0, 1] became (x - mean) / std, a number for each channel or one for
  # all, std above 0; act as model.act. Empty: what the files say, or else the family.
  base.mean = ()
  base.std = ()
  base.act = ''
  base.optimizer = adamw(learning_rate=1e-3, weight_decay=0.05)
  base.schedule = cosine(warmup=0.05)
  base.augment = augmentation()
  base.train = loop(epochs=100.0, batch_size=512)
  return base


def _head() -> ConfigDict:
  """How the classification head starts, and the recipe of its own training."""
  head = ConfigDict()
  # '': as the base has it, new where the base's rows do not fit the classes; zeros; rows: the
  # base's, or an error; probe, adversarial_probe: it is first trained alone, by the recipe below,
  # on clean images or against config.attack; or the work directory or the adapter of a finished run
  # of method linear on this base.
  head.start = ''
  # That of Hua et al., 2024 (RoLI), for CIFAR-10; for CIFAR-100 they take 0.1 and 1e-3.
  head.optimizer = sgd(learning_rate=0.05, weight_decay=0.01)
  head.optimizer.clip = 0.0
  head.schedule = cosine(warmup=0.5)
  head.train = loop(epochs=20.0, batch_size=64)
  return head


def _eval() -> ConfigDict:
  """What is attacked after training, and by which attacks."""
  evaluation = ConfigDict()
  # name[-steps]; autoattack and its attacks too (attacks/named.py).
  evaluation.attacks = ('clean', 'fgsm', 'pgd-20', 'cw_linf-20')
  # What measures expected robustness (evaluation/expected.py): pgd-20 or the like; '': nothing.
  evaluation.expected = ''
  # Certificates of the smoothed model and an attack on it (evaluation/certificate.py), as
  # sigma=0.25,n0=100,n=100000,alpha=0.001, all but sigma by default so; '': none.
  evaluation.certify = ''
  # The test images under common corruptions (evaluation/shifts.py): all, or names as fog,frost of
  # data/corruptions.py; '': none.
  evaluation.corruptions = ''
  # Other test sets of the model's classes, a set of tfds or folder:/path each, after commas.
  evaluation.shifts = ''
  # Several threats whose union is attacked (evaluation/union.py), as linf:8/255,l2:0.5,l1:12; '':
  # none.
  evaluation.union = ''
  # Strengths of the adapter from 0, the base, to 1, each attacked (evaluation/dial.py), as
  # 0,0.25,0.5,0.75,1; '': none.
  evaluation.dial = ''
  evaluation.weights = ()  # of base, best and last; (): all there are
  evaluation.step_size = '2/255'  # of pgd and cw_linf, as attack.step_size
  evaluation.restarts = 1  # random starts of pgd and cw_linf, at least 1
  evaluation.batch_size = 256  # images on all devices together, at least 1
  evaluation.num_examples = 0  # of the test split, chosen by the seed; 0: all
  evaluation.validation_attack = 'pgd-10'  # chooses `best`; no ensemble
  evaluation.validation_examples = 1000  # the most that it attacks; 0: all
  # Whether to attack a few hundred more images for report.html: the sweep of
  # eps below, the most and least robust images, and what the adapter changed.
  evaluation.closer_look = True
  # Multiples of eps, above 0, at which report.html shows the robust accuracy
  # under the validation attack, on at most 256 test images; (): none.
  evaluation.radii = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
  return evaluation


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

  A field that this version no longer has is dropped where it was off.

  Raises:
    UserError: a field is unknown or of another type, or one that this version
      no longer has was on; the message names it.
  """
  config = default()
  try:
    _fill(config, values, '')
  except (AttributeError, TypeError) as error:
    raise UserError(f'saved config: it is damaged ({error})') from None
  return config


def _fill(config: ConfigDict, values: Mapping[str, Any], prefix: str) -> None:
  for key, value in values.items():
    if f'{prefix}{key}' in _REMOVED:
      _check_was_off(f'{prefix}{key}', value)
    elif new := _RENAMED.get(f'{prefix}{key}'):
      config[new] = f'{value}'.removesuffix('.0')
    elif key not in config:
      raise UserError(
        f'saved config: unknown field {prefix}{key}; it was written by '
        'another version of fulllora_jax'
      )
    elif isinstance(value, Mapping):
      _fill(config[key], value, f'{prefix}{key}.')
    else:
      config[key] = tuple(value) if isinstance(value, list) else value


def _check_was_off(field: str, value: Any) -> None:
  if value != _REMOVED[field]:
    raise UserError(
      f'saved config: {field} is {value}, but this version of fulllora_jax has no {field} any more '
      '(docs/road.md has what it gave); use the version that wrote it'
    )


def flat(config: ConfigDict) -> dict[str, Any]:
  """Flattens to {'train.steps': 100, ...}, for comparing and printing."""
  return dict(_flatten('', as_plain(config)))


def _flatten(prefix: str, values: Mapping[str, Any]):
  for key, value in values.items():
    if isinstance(value, Mapping):
      yield from _flatten(f'{prefix}{key}.', value)
    else:
      yield f'{prefix}{key}', value


def base_config(config: ConfigDict) -> ConfigDict:
  """Returns the config of the standard training that makes the base.

  Same model, data and seed; method `standard` with the recipe of `config.base`; evaluated on clean
  images only, since the main run evaluates the base under every attack.
  """
  base = ConfigDict(config.to_dict())
  base.name = f'{config.name}-base'
  base.method = 'standard'
  for part in ('optimizer', 'schedule', 'augment', 'train'):
    base[part] = ConfigDict(config.base[part].to_dict())
  # What else belongs to the main run alone.
  for part in ('objective', 'awp', 'ema', 'head'):
    base[part] = ConfigDict(default()[part].to_dict())
  base.attack.update(carry=False, ard=0.0, prm=0.0, on_overfitting='warn')
  base.threat.union = ''
  base.base.source = 'scratch'
  base.eval.update(dict.fromkeys(BESIDE, ''), attacks=('clean',))
  base.eval.validation_attack = 'clean'
  return base
