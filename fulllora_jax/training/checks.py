"""What can be known wrong of a config before data is read or code compiled."""

from fulllora_jax import models
from fulllora_jax.adapters import methods, mixed
from fulllora_jax.attacks.threat import EXAMPLES, parse_fraction
from fulllora_jax.config import PROBES, ConfigDict, default
from fulllora_jax.core.console import warn
from fulllora_jax.core.errors import UserError, choose, require
from fulllora_jax.evaluation import ranges
from fulllora_jax.evaluation.checks import refuse_rand, validate_evaluation
from fulllora_jax.evaluation.settings import Plan, threat
from fulllora_jax.training import carry, objectives, optim, turns
from fulllora_jax.training.algorithm import hinges
from fulllora_jax.training.hinges import AUTO
from fulllora_jax.training.inner_attack import ATTACKS, FIXED
from fulllora_jax.training.overfitting import ANSWERS


def validate(config: ConfigDict, num_devices: int) -> None:
  """Checks what can be known before data is read or anything compiled.

  Warns on stderr where the image makes fewer than 16 tokens.

  Raises:
    UserError: a field is wrong; the message names the first.
  """
  ranges.check(config)
  method = methods.get(config.method)
  models.linear_maps(config.model.name)
  if config.base.source in ('train', 'scratch'):  # nothing else settles it
    models.create(config.model, num_classes=2)
  validate_evaluation(config)
  refuse_rand(config)
  for plan in turns.plans(config):
    validation = plan.attack(config.eval.validation_attack)
    if validation.version:
      raise UserError(
        f'eval.validation_attack {validation.label}: an ensemble takes too long '
        'to choose among checkpoints; give pgd-10'
      )
  _check_adapter(config, method)
  if config.base.source == 'scratch' and method.trains_less_than_all():
    raise UserError(
      f'base.source scratch: method {config.method} freezes a base, so it '
      'needs one; give train, or the work directory of a run'
    )
  if config.base.dtype == 'bfloat16':
    why = 'base.dtype bfloat16: the model must not compute with more'
    require(config, {'model.dtype': 'bfloat16'}, why, 'base.dtype float32')
  _check_mesh(config, num_devices)
  _check_attack(config)
  _check_objective(config, method)
  _check_patches(config)
  _check_head(config, method, num_devices)
  _check_recipe('', config, config.data.image_size, num_devices)
  if config.base.source == 'train':
    _check_recipe('base.', config.base, config.data.image_size, num_devices)


def _check_adapter(config: ConfigDict, method: methods.Method) -> None:
  """Refuses what cannot be, and what the method would not read.

  A rank or an alpha that it does not read is let pass, for configs set them,
  and so is all in a base that is trained first, which has its run's fields.
  """
  adapter, usual = config.adapter, default().adapter
  if method.adversarial:
    for field in ('targets', 'prompts'):
      if field not in method.reads and adapter[field] != usual[field]:
        readers = [m.name for m in methods.METHODS.values() if field in m.reads]
        raise UserError(
          f'adapter.{field} {adapter[field]}: method {method.name} reads no '
          f'{field}; leave it out, or give {", ".join(readers)}'
        )
    if adapter.head == 'lnlora' and method.branch is None:
      raise UserError(f'adapter.head lnlora: method {method.name} has no adapter; give train')
  branches = methods.branches(config, method)
  if config.eval.dial and (why := mixed.no_dial(branches, method.name)):
    raise UserError(f"eval.dial {config.eval.dial}: {why}; give eval.dial ''")


def _check_mesh(config: ConfigDict, num_devices: int) -> None:
  fsdp = config.mesh.fsdp
  if num_devices % fsdp:
    raise UserError(
      f'mesh.fsdp {fsdp} does not divide the {num_devices} devices; give a divisor of them, or 1'
    )
  if fsdp > 1 and config.model.remat == 'none':
    warn(
      f'mesh.fsdp {fsdp} saves no memory with model.remat none, which keeps every part of the base '
      'that was fetched until the backward pass is over; give model.remat dots or blocks'
    )


def _check_attack(config: ConfigDict) -> None:
  step_size = parse_fraction(config.attack.step_size, 'attack.step_size')
  choose('attack.name', config.attack.name, ATTACKS)
  choose('attack.on_overfitting', config.attack.on_overfitting, ANSWERS)
  if config.attack.name in FIXED:
    _check_fixed(config, FIXED[config.attack.name].norms)
  carry.check(config)
  turns.check(config)
  start, full = hinges(config)
  if config.attack.eps_start == AUTO and not full:
    raise UserError(
      'attack.eps_start auto: eps starts by half of attack.eps_full, which is 0; give an eps_full '
      'such as 37/50, or eps_start 0'
    )
  if start > full:
    raise UserError(
      f'attack.eps_start {config.attack.eps_start} is after attack.eps_full '
      f'{config.attack.eps_full}: eps leaves 0 before it is full; give an eps_full from '
      f'{config.attack.eps_start} to 1, or eps_start 0'
    )
  eps = float(threat(config).eps)
  if step_size > 2 * eps > 0:
    warn(
      f'attack.step_size {config.attack.step_size} is over twice threat.eps '
      f'{config.threat.eps}: every step jumps across the whole ball'
    )
  _check_scale(config, eps)
  if abs(eps * 255 - round(eps * 255)) > 1e-6 and 0.03 <= eps <= 0.032:
    warn(f'threat.eps {config.threat.eps} is not 8/255; write 8/255 if meant')


def _check_scale(config: ConfigDict, eps: float) -> None:
  """Refuses a radius and steps that linf has, for another norm: they would attack weakly."""
  norm = config.threat.norm
  if norm == 'linf':
    return
  if config.threat.eps == default().threat.eps:
    raise UserError(
      f'threat.norm {norm}: threat.eps {config.threat.eps} is a radius of linf; give one '
      f'{EXAMPLES[norm]}'
    )
  iterated = [a.steps for a in Plan.of(config).all_attacks() if a.restarts]
  for part, count in (('attack', config.attack.steps), ('eval', max(iterated, default=0))):
    text = config[part].step_size
    if 0 < count * parse_fraction(text) < 0.999 * eps:
      raise UserError(
        f'threat.norm {norm}: {count} steps of {part}.step_size {text} do not reach threat.eps '
        f'{config.threat.eps} (is it one of linf?); give a longer one, such as {eps / 4:g}'
      )


def _check_fixed(config: ConfigDict, norms: tuple[str, ...]) -> None:
  """Refuses what says of a single-step attack that it has several steps."""
  attack = config.attack
  if config.threat.norm not in norms:
    raise UserError(
      f'attack.name {attack.name} needs threat.norm {" or ".join(norms)}, but '
      f'it is {config.threat.norm}; give attack.name pgd'
    )
  require(
    config,
    {'attack.random_start': True, 'attack.carry': False, 'attack.restarts': 1},
    f'attack.name {attack.name} makes one step from one random start',
    'attack.name pgd',
  )


def _check_objective(config: ConfigDict, method: methods.Method) -> None:
  """Checks objective, awp, ema, attack.ard and attack.prm."""
  for field in ('ard', 'prm'):
    if value := config.attack[field]:
      why = f'attack.{field} {value} is drawn in each step of PGD'
      require(config, {'attack.name': 'pgd'}, why, f'attack.{field} 0.0')
  if not method.adversarial:
    require(
      config,
      {'objective.name': 'pgd_at', 'awp.gamma': 0.0, 'attack.ard': 0.0, 'attack.prm': 0.0}
      | {'threat.union': ''},
      f'method {config.method} trains without an adversary',
      'another method',
    )
  name, beta = config.objective.name, config.objective.beta
  objective, usual = objectives.get(name), default().objective.beta
  if 'beta' not in objective.reads and beta != usual:
    readers = [n for n, o in objectives.OBJECTIVES.items() if 'beta' in o.reads]
    raise UserError(
      f'objective.beta {beta}: {name} has no such weight; give objective.name '
      f'{" or ".join(readers)}, or objective.beta {usual}'
    )
  objective.check(config)
  if config.awp.warmup and not config.awp.gamma:
    raise UserError(
      f'awp.warmup {config.awp.warmup}: nothing starts after it while '
      'awp.gamma is 0; give e.g. awp.gamma 0.005, or awp.warmup 0'
    )
  if config.awp.gamma:
    why = 'awp.gamma perturbs the weights by the gradient of the whole batch'
    require(config, {'train.accumulate': 1}, why, 'awp.gamma 0.0')


def _check_patches(config: ConfigDict) -> None:
  image, patch = config.data.image_size, config.model.patch_size
  if image % patch or image < patch:
    raise UserError(
      f'model.patch_size {patch} does not divide data.image_size {image}; change one of them'
    )
  tokens = (image // patch) ** 2
  if tokens < 16:
    warn(
      f'model.patch_size {patch} at data.image_size {image} makes only '
      f'{tokens} tokens; below 16 a ViT learns badly, use a smaller patch'
    )


def _check_head(config: ConfigDict, method: methods.Method, num_devices: int) -> None:
  """Refuses a start of the head that the run's method and base cannot have."""
  start, source = config.head.start, config.base.source
  if not start:
    return
  if start in PROBES:
    _check_recipe('head.', config.head, config.data.image_size, num_devices)
  instead = "leave head.start empty ('')"
  if not method.learns('params', 'head/kernel', 'head'):
    raise UserError(
      f'head.start {start}: method {method.name} has no head, neither one that learns nor one that '
      f'its adapter holds; {instead}, or give another method'
    )
  scratch = source == 'scratch' or (source == 'train' and not method.adversarial)
  if scratch and start != 'zeros':
    raise UserError(
      f'head.start {start}: method {method.name} with base.source {source} has no base whose '
      f'features a head could read; {instead}, or give base.source a run or a checkpoint'
    )
  if start == 'zeros' and method.branch is not None and config.adapter.head == 'frozen':
    raise UserError(
      'head.start zeros: adapter.head is frozen, so every logit would stay 0; give adapter.head '
      f'train, or head.start probe or adversarial_probe, or {instead}'
    )


def _check_recipe(prefix: str, recipe: ConfigDict, image: int, num_devices: int) -> None:
  """Checks the optimizer, schedule, augmentation and loop of one training."""
  train, schedule = recipe.train, recipe.schedule
  choose(f'{prefix}optimizer.name', recipe.optimizer.name, optim.OPTIMIZERS)
  choose(f'{prefix}schedule.name', schedule.name, optim.SCHEDULES)
  if 'augment' in recipe and (padding := recipe.augment.crop_padding) >= image:
    raise UserError(
      f'{prefix}augment.crop_padding {padding}: a crop may then hold nothing of an image; it must '
      f'be below data.image_size {image}'
    )
  boundaries = list(schedule.boundaries)
  if schedule.name == 'step' and (
    len(boundaries) != len(schedule.factors)
    or boundaries != sorted(boundaries)
    or any(not schedule.warmup < b <= 1 for b in boundaries)
  ):
    raise UserError(
      f'{prefix}schedule.boundaries {tuple(boundaries)}: they must rise from schedule.warmup to 1, '
      f'one for each of schedule.factors {tuple(schedule.factors)}'
    )
  if train.batch_size % (train.accumulate * num_devices):
    raise UserError(
      f'{prefix}train.batch_size {train.batch_size} does not divide into '
      f'train.accumulate {train.accumulate} microbatches over {num_devices} '
      f'devices; use a multiple of {train.accumulate * num_devices}'
    )
