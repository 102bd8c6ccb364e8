"""PyTorch at the same work, in a process of its own, to be timed beside ours.

  spec = spec_of(config, num_classes=10, image_shape=(32, 32, 3))
  with TorchPeer(spec) as peer:
    seconds = peer.step()

Imports no PyTorch: worker.py does, in the other process. What PyTorch does, and
where that differs from ours, step.py says.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fulllora_jax import data, models
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation import settings
from fulllora_jax.experiments.speed.torch.spec import TARGETS, Spec
from fulllora_jax.models.vit import SIZE_FIELDS

_COMMAND = (sys.executable, '-m', 'fulllora_jax.experiments.speed.torch.worker')
_PATIENCE = 5.0  # seconds in which a process that hung up may end
_FAMILIES = ('vit', 'deit')
_METHODS = {
  'fulllora': 'lora',  # peft has no LNLoRA
  'lora_everywhere': 'lora',
  'linear': 'linear',
  'full': 'full',
  'standard': 'full',
}
_TIMM_NAMES = dict(
  patch_embed='patch_embed.proj', query='qkv', key='qkv', value='qkv',
  attn_out='attn.proj', fc1='mlp.fc1', fc2='mlp.fc2', head='head',
)  # fmt: skip


class TorchPeer:
  """The other process; a context manager, inside of which it is compiled."""

  # Until the first step and attack were done, those included; cold, for no
  # cache of compiled programs is kept.
  compile_seconds: float
  trainable: int  # count of the parameters that learn

  def __init__(self, spec: Spec, command: Sequence[str] = _COMMAND):
    self.spec, self._command = spec, command

  def __enter__(self) -> 'TorchPeer':
    """Starts the process and waits until everything is compiled.

    Raises:
      UserError: PyTorch, timm or peft is missing, CUDA is asked for and not
        there, torch.compile does not work, or the process dies.
    """
    with contextlib.ExitStack() as cleaning:
      self._launch(cleaning)
      vars(self).update(self._ask(self.spec))
      self._cleaning = cleaning.pop_all()
    return self

  def __exit__(self, *_: object) -> None:
    self._cleaning.close()

  def step(self) -> float:
    """Makes a training step; returns its seconds, synchronised.

    Raises:
      UserError: the process has died, with what it said last.
    """
    return self._ask(('step', {}))

  def attack(self, steps: int) -> float:
    """Attacks a batch as an evaluation does; returns the seconds.

    Args:
      steps: how many steps PGD makes from its random start; a forward pass on the result follows.
    """
    return self._ask(('attack', {'steps': steps}))

  @property
  def peak_memory(self) -> int:
    """Bytes: of the GPU since the warm-up; on the CPU the process's most.

    The latter has PyTorch itself and its compiler in it.
    """
    return self._ask(('peak_memory', {}))

  def _launch(self, cleaning: contextlib.ExitStack) -> None:
    cache = cleaning.enter_context(
      tempfile.TemporaryDirectory(prefix='fulllora_torch_', ignore_cleanup_errors=True)
    )
    self._log = Path(cache, 'log')
    self._pipe, theirs = multiprocessing.Pipe()
    cleaning.enter_context(self._pipe)
    with theirs, self._log.open('wb') as log:
      self._process = subprocess.Popen(
        [*self._command, str(theirs.fileno())],
        stdin=subprocess.PIPE,  # the process ends with it
        stdout=log,
        stderr=log,
        pass_fds=[theirs.fileno()],
        env={**os.environ, 'TORCHINDUCTOR_CACHE_DIR': cache},
        start_new_session=True,
      )
    cleaning.callback(self._end)

  def _end(self) -> None:
    """Ends the process, and what torch.compile has started in its group."""
    with self._process, contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)

  def _ask(self, request: Any) -> Any:
    try:
      self._pipe.send(request)
      answer = self._pipe.recv()
    except (EOFError, OSError):
      raise UserError(self._obituary()) from None
    if isinstance(answer, UserError):
      raise answer
    return answer

  def _obituary(self) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(_PATIENCE)
    status = self._process.poll()
    how = f'exit status {status}'
    if status is not None and status < 0:
      how = f'killed by {signal.Signals(-status).name}'
    said = self._log.read_text(errors='replace').split('\n')
    last = next(filter(None, map(str.strip, reversed(said))), 'it said nothing')
    return f'torch peer: the PyTorch process has died ({how}): {last}'


def start(
  stack: contextlib.ExitStack, config, dataset: data.Dataset, modes: Sequence[str]
) -> dict[str, TorchPeer]:
  """Starts a peer for each mode, compiled and warm.

  They use the device that JAX uses, or as many threads as this process may.

  Args:
    stack: ends the processes when it is left.
    config: config.py.
    dataset: the peers' images have its shape and its number of classes.
    modes: 'eager', or keys of COMPILE_MODES.

  Returns:
    Name in tables -> the peer.
  """
  device = 'cpu' if jax.default_backend() == 'cpu' else 'cuda'
  running = {}
  for mode in modes:
    spec = spec_of(
      config,
      dataset.num_classes,
      dataset.image_shape,
      mode=mode,
      device=device,
      threads=len(os.sched_getaffinity(0)),
    )
    name = f'torch {spec.method}, {mode}'
    say(f'starting {name}')
    running[name] = stack.enter_context(TorchPeer(spec))
  return running


def spec_of(config, num_classes: int, image_shape: tuple[int, int, int], **how: Any) -> Spec:
  """Describes the training step of a config for PyTorch.

  Args:
    config: config.py.
    num_classes: how many logits.
    image_shape: height, width and channels.
    **how: fields of Spec that say how it runs: dtype (of the config where it
      is not given), mode, device, threads.

  Raises:
    UserError: timm and peft have not the like of the config, naming the field.
  """
  _check(config)
  height, width, channels = image_shape
  if height != width:
    raise UserError(f'torch peer: images of {height} x {width} pixels; it takes square ones')
  models.create(config.model, num_classes=2)  # is it whole?
  model = models.settings(config.model)
  adapter, optimizer = config.adapter, config.optimizer
  fields = {
    **{f: model[f] for f in (*SIZE_FIELDS, 'pool', 'act', 'epsilon')},
    **{f: tuple(model[f]) for f in ('mean', 'std')},
    **{f: config.augment[f] for f in ('crop_padding', 'flip')},
    **{f: optimizer[f] for f in ('learning_rate', 'momentum', 'weight_decay')},
    'dtype': config.model.dtype,
  }
  return Spec(
    image_size=height,
    channels=channels,
    patch_size=config.model.patch_size,
    num_classes=num_classes,
    batch_size=config.train.batch_size,
    method=_METHODS[config.method],
    targets=_targets(adapter),
    rank=adapter.rank,
    alpha=adapter.alpha,
    train_head=adapter.head == 'train',
    eps=settings.threat(config).eps,
    attack_steps=0 if config.method == 'standard' else config.attack.steps,
    step_size=parse_fraction(config.attack.step_size, 'attack.step_size'),
    eval_step_size=parse_fraction(config.eval.step_size, 'eval.step_size'),
    random_start=config.attack.random_start,
    optimizer=optimizer.name,
    betas=(optimizer.b1, optimizer.b2),
    clip=optimizer.clip,
    log_every=config.train.log_every,
    seed=config.seed,
    **fields | how,
  )


def _check(config) -> None:
  """Raises UserError for a field that would make another work of it."""
  if config.method not in _METHODS:
    raise UserError(
      f'torch peer: method {config.method}: it has the like of '
      f'{", ".join(_METHODS)} alone; compare with one of those'
    )
  model = config.model
  family, _, size = model.name.partition('_')
  if family not in _FAMILIES or '_' in size:
    raise UserError(
      f'torch peer: model.name {model.name}: it has the families '
      f'{" and ".join(_FAMILIES)} alone; compare with one of those'
    )
  # A class token that the pool does not read.
  spare = bool(model.class_token) and (model.pool or 'token') != 'token'
  for name, value, wanted in (
    ('model.swiglu', model.swiglu or False, False),
    ('model.dropout', model.dropout, 0.0),
    ('model.remat', model.remat, 'none'),
    ('model.class_token', spare, False),
    ('threat.norm', config.threat.norm, 'linf'),
    ('attack.loss', config.attack.loss, 'ce'),
    ('attack.restarts', config.attack.restarts, 1),
    ('train.accumulate', config.train.accumulate, 1),
  ):
    if value != wanted:
      raise UserError(
        f'torch peer: {name} {value}: it has {wanted} alone; set '
        f'--config.{name}={wanted} to compare'
      )
  for override in config.adapter.overrides:
    if '.rank=' in override or '.alpha=' in override:
      raise UserError(
        f'torch peer: adapter.overrides {override!r}: it has one rank and '
        'alpha for all; leave it out to compare'
      )


def _targets(adapter) -> tuple[str, ...]:
  """Returns timm's names of the maps that get a branch."""
  names = [_TIMM_NAMES.get(target) for target in adapter.targets] or [*TARGETS]
  if None in names:
    unknown = adapter.targets[names.index(None)]
    raise UserError(
      f'torch peer: adapter.targets {unknown!r}: it knows the roles {", ".join(_TIMM_NAMES)} alone'
    )
  if adapter.head == 'lnlora':
    names.append('head')
  return tuple(dict.fromkeys(names))
