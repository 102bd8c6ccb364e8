"""PyTorch at the same work, in a process of its own, to be timed beside ours.

  spec = spec_of(config, num_classes=10, image_shape=(32, 32, 3))
  with TorchPeer(spec) as peer:
    seconds = peer.run(steps=3)

Imports no PyTorch; torch_worker.py does, in the other process. What PyTorch
does, and where that differs from ours, torch_step.py says.
"""

import collections
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from fulllora_jax import models
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation import settings
from fulllora_jax.experiments.speed.torch.spec import (
  COMPILE_MODES,
  TARGETS,
  Spec,
)
from fulllora_jax.models.vit import SIZE_FIELDS

__all__ = ['COMPILE_MODES', 'Spec', 'TorchPeer', 'spec_of']

_COMMAND = (sys.executable, '-m', 'fulllora_jax.experiments.speed.torch.worker')
_PATIENCE = 5.0  # seconds in which the other process may end by itself
_ARITHMETIC = ('pool', 'act', 'epsilon')
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
  """The other process; a context manager.

  Attributes:
    spec: what it does.
    compile_seconds: until the first step and attack were done, those included;
      cold, for no cache of compiled programs is kept.
    trainable: count of the parameters that learn.
    versions: of torch, timm and peft.
    device: 'cpu', or the GPU's name.
    threads: of the CPU.
  """

  def __init__(self, spec: Spec, command: Sequence[str] = _COMMAND):
    self.spec = spec
    self._command = tuple(command)
    self._process: subprocess.Popen | None = None
    self._cleaning = contextlib.ExitStack()
    self._last_words: collections.deque[str] = collections.deque(maxlen=20)

  def __enter__(self) -> 'TorchPeer':
    """Starts the process and waits until everything is compiled.

    Raises:
      UserError: PyTorch, timm or peft is missing, CUDA is asked for and not
        there, torch.compile does not work, or the process dies.
    """
    try:
      self._launch()
      facts = self._ask(dataclasses.asdict(self.spec))
    except BaseException:
      self.close()
      raise
    self.compile_seconds = facts['compile_seconds']
    self.trainable = facts['trainable']
    self.versions = facts['versions']
    self.device = facts['device']
    self.threads = facts['threads']
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def run(self, steps: int) -> list[float]:
    """Makes training steps; returns the seconds of each, synchronised.

    Raises:
      UserError: the process has died, with what it said last.
    """
    return self._ask(['run', {'steps': steps}])

  def attack(self, steps: int = 20, repeats: int = 1) -> list[float]:
    """Attacks a batch as an evaluation does, `repeats` times.

    Args:
      steps: of PGD, from a random start; a forward pass on the result follows.
      repeats: how many times.

    Returns:
      Images per second of each.

    Raises:
      UserError: the process has died, with what it said last.
    """
    return self._ask(['run_attack', {'steps': steps, 'repeats': repeats}])

  @property
  def peak_memory(self) -> int:
    """Bytes: of the GPU since the warm-up; on the CPU the process's most.

    The latter has PyTorch itself and its compiler in it.
    """
    return self._ask(['peak_memory', {}])

  def close(self) -> None:
    """Ends the process, by force if it takes more than a few seconds."""
    process, self._process = self._process, None
    if process is not None:
      with contextlib.suppress(OSError):
        process.stdin.close()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE)
      # What torch.compile has started is in the same group.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      self._listener.join(_PATIENCE)
      process.stdout.close()
    self._cleaning.close()

  def _launch(self) -> None:
    cache = self._cleaning.enter_context(
      tempfile.TemporaryDirectory(
        prefix='fulllora_torch_', ignore_cleanup_errors=True
      )
    )
    self._process = subprocess.Popen(
      self._command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      errors='replace',
      env={**os.environ, 'TORCHINDUCTOR_CACHE_DIR': cache},
      start_new_session=True,
    )
    self._listener = threading.Thread(
      target=_keep_lines,
      args=(self._process.stderr, self._last_words),
      daemon=True,
    )
    self._listener.start()

  def _ask(self, request: Any) -> Any:
    try:
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
      line = self._process.stdout.readline()
    except BrokenPipeError:
      line = ''
    if not line:
      raise UserError(self._obituary())
    reply = json.loads(line)
    if 'error' in reply:
      raise UserError(reply['error'])
    return reply['answer']

  def _obituary(self) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(_PATIENCE)
    self._listener.join(_PATIENCE)
    status = self._process.poll()
    how = f'exit status {status}'
    if status is not None and status < 0:
      how = f'killed by {signal.Signals(-status).name}'
    said = self._last_words[-1] if self._last_words else 'it said nothing'
    return f'torch peer: the PyTorch process has died ({how}): {said}'


def _keep_lines(stream, lines: collections.deque) -> None:
  """Empties a stream, which would else fill and stop its writer."""
  with stream:
    lines.extend(filter(None, map(str.strip, stream)))


def spec_of(
  config,
  num_classes: int,
  image_shape: tuple[int, int, int],
  *,
  dtype: str = '',
  mode: str = 'eager',
  device: str = 'cpu',
  threads: int = 0,
) -> Spec:
  """Describes a run's training step for PyTorch.

  Args:
    config: config.py.
    num_classes: K.
    image_shape: H, W, C, pixels.
    dtype: of the computation; '': of config.model.dtype.
    mode: 'eager' or one of COMPILE_MODES.
    device: 'cpu' or 'cuda'.
    threads: of the CPU; 0: PyTorch's choice.

  Raises:
    UserError: timm and peft have not the like of the config, naming the field.
  """
  if config.method not in _METHODS:
    raise UserError(
      f'torch peer: method {config.method}: it has the like of '
      f'{", ".join(_METHODS)} alone; compare with one of those'
    )
  model, optimizer = _plain_vit(config), config.optimizer
  _check_same(config)
  height, width, channels = image_shape
  if height != width:
    raise UserError(
      f'torch peer: images of {height} x {width} pixels; it takes square ones'
    )
  return Spec(
    **{field: model[field] for field in (*SIZE_FIELDS, *_ARITHMETIC)},
    image_size=height,
    channels=channels,
    patch_size=config.model.patch_size,
    num_classes=num_classes,
    batch_size=config.train.batch_size,
    mean=tuple(model['mean']),
    std=tuple(model['std']),
    method=_METHODS[config.method],
    targets=_targets(config.adapter),
    rank=config.adapter.rank,
    alpha=config.adapter.alpha,
    train_head=config.adapter.head == 'train',
    eps=settings.threat(config).eps,
    attack_steps=0 if config.method == 'standard' else config.attack.steps,
    step_size=parse_fraction(config.attack.step_size, 'attack.step_size'),
    eval_step_size=parse_fraction(config.eval.step_size, 'eval.step_size'),
    random_start=config.attack.random_start,
    crop_padding=config.augment.crop_padding,
    flip=config.augment.flip,
    optimizer=optimizer.name,
    learning_rate=optimizer.learning_rate,
    momentum=optimizer.momentum,
    betas=(optimizer.b1, optimizer.b2),
    weight_decay=optimizer.weight_decay,
    clip=optimizer.clip,
    log_every=config.train.log_every,
    dtype=dtype or config.model.dtype,
    mode=mode,
    device=device,
    threads=threads,
    seed=config.seed,
  )


def _plain_vit(config) -> dict[str, Any]:
  """Returns the model's settings, or raises UserError."""
  name = config.model.name
  family, _, size = name.partition('_')
  if family not in _FAMILIES or '_' in size:
    raise UserError(
      f'torch peer: model.name {name}: it has the families '
      f'{" and ".join(_FAMILIES)} alone; compare with one of those'
    )
  models.create(config.model, num_classes=2)  # is it whole?
  return models.settings(config.model)


def _check_same(config) -> None:
  """Raises UserError for a field that would make another work of it."""
  for name, value, wanted in (
    ('model.swiglu', config.model.swiglu or False, False),
    ('model.dropout', config.model.dropout, 0.0),
    ('model.remat', config.model.remat, 'none'),
    ('model.class_token', _spare_token(config.model), False),
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


def _spare_token(model) -> bool:
  """Returns whether there is a class token that the pool does not read."""
  pool = model.pool or 'token'
  return bool(model.class_token) and pool != 'token'


def _targets(adapter) -> tuple[str, ...]:
  """Returns timm's names of the maps that get a branch."""
  names = [_TIMM_NAMES.get(target) for target in adapter.targets] or [*TARGETS]
  if None in names:
    unknown = adapter.targets[names.index(None)]
    raise UserError(
      f'torch peer: adapter.targets {unknown!r}: it knows the roles '
      f'{", ".join(_TIMM_NAMES)} alone'
    )
  if adapter.head == 'lnlora':
    names.append('head')
  return tuple(dict.fromkeys(names))
