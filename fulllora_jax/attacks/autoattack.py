"""AutoAttack (Croce & Hein, 2020, arXiv 2003.01690) in fixed shapes.

Each attack of the ensemble runs on the images that all before it left robust, restart after restart
and target after target. The host packs these runs into batches of one shape, the last one filled up
and masked, so each attack compiles once, whatever the number of images left.
"""

import dataclasses
import functools
import hashlib
import os
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from fulllora_jax.attacks import ensemble, fingerprint, found, inputs, losses
from fulllora_jax.attacks.cascade import ROBUST, Cascade
from fulllora_jax.attacks.ensemble import Member
from fulllora_jax.attacks.progress import Outcome, Progress
from fulllora_jax.attacks.runs import Clock, Runs, batches
from fulllora_jax.attacks.threat import Threat
from fulllora_jax.core import files
from fulllora_jax.core.batching import fill_up
from fulllora_jax.core.console import duration
from fulllora_jax.core.errors import choose
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.distributed import processes


class Result(NamedTuple):
  """What `autoattack` returns."""

  x_adv: np.ndarray  # float32 [N, H, W, C]; the image itself where no attack broke it
  robust: np.ndarray  # bool [N], right without an attack and under every one
  cascade: Cascade  # how it came about


def autoattack(
  key: jax.Array,
  logits_fn: Callable[..., jax.Array],
  x: np.ndarray | jax.Array,
  labels: np.ndarray | jax.Array,
  threat: Threat,
  version: str | Sequence[str] = 'standard',
  batch_size: int = 128,
  *,
  indices: np.ndarray | None = None,
  progress_dir: str | os.PathLike | None = None,
  precision: str = 'highest',
  mesh: Mesh | None = None,
  say: Callable[[str], None] | None = None,
) -> Result:
  """Measures how many images are robust under an ensemble of attacks.

  Args:
    key: a PRNG key. An attack's draws for an image follow from it and the image's index, not from
      its batch; the noise of a stochastic model is one for a batch.
    logits_fn: any jittable function, images [B, H, W, C] -> logits [B, K]; for version 'rand'
      (images, key) -> logits. Weights that it closes over become constants of the program;
      jax.tree_util.Partial(apply, variables) passes large ones as arguments. A pytree with a method
      `for_images(rows)` has inputs of its own for each image, such as many.logits_fn(names): it
      takes the N images of x, and what it returns a batch of those rows.
    x: float32 [N, H, W, C] in [0, 1].
    labels: int [N] in [0, K).
    threat: norm and eps.
    version: 'standard', 'plus', 'rand', 'second' (standard, then pma and malt), the same on margins
      ('margin', 'margin-plus', ...), which 2 or 3 classes get in any case; or a list of 'apgd-ce',
      'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square', 'square-1000', 'pma', 'malt', ...
    batch_size: how many images are attacked at once, on all devices together; they must divide it.
    indices: int [N], what identifies each image in its draws; default 0..N-1.
    progress_dir: keeps finished batches there, and takes them up again.
    precision: the precision of matrix products, 'highest' or 'default'.
    mesh: batches are sharded over its axis `data`; default all devices.
    say: gets a line of progress now and then.

  Raises:
    UserError: any argument that does not fit, in one line, before anything is
      computed; NaN logits, or logits that depend on an image's row in the
      batch; a progress_dir of another evaluation or model.

  >>> import jax, jax.numpy as jnp, numpy as np
  >>> x = np.full((2, 4, 4, 1), 0.5, np.float32) + [[[[0.1]]], [[[0.3]]]]
  >>> brightness = lambda x: (x.mean((1, 2, 3))[:, None] - 0.5) * jnp.array(
  ...   [1.0, -1.0])
  >>> result = autoattack(
  ...   jax.random.key(0), brightness, x.astype(np.float32), np.array([0, 0]),
  ...   Threat('linf', 0.2), ['apgd-ce'], batch_size=jax.device_count())
  >>> result.robust.tolist(), result.cascade.accuracy
  ([False, True], (1.0, 0.5))
  """
  mesh = mesh or mesh_lib.make_mesh()
  key = inputs.keys_of(key)
  choose('precision', precision, ('highest', 'default'))
  x, labels, indices = inputs.check(x, labels, indices, threat)
  chosen = ensemble.members(version, threat.norm)
  inputs.check_batch_size(batch_size, mesh.size)
  size = min(batch_size, mesh_lib.round_up(len(x), mesh))
  stochastic = any(member.draws > 1 for member in chosen)
  called_with = len(x) if hasattr(logits_fn, 'for_images') else size
  num_classes = inputs.num_classes(logits_fn, x, called_with, stochastic, labels)
  version = ensemble.for_classes(version, num_classes)
  chosen, notes = ensemble.fit(ensemble.members(version, threat.norm), num_classes)
  images = (x, labels, indices)
  run = _Run(key, logits_fn, images, threat, chosen, size, precision, mesh)
  rows = np.arange(len(x))
  logits = run.clean_logits(rows)
  inputs.check_finite(logits)
  if not stochastic:  # the noise of a row is its own
    moved = np.roll(rows[:size], 1)
    inputs.check_same_rows(logits[moved], run.clean_logits(moved))
  progress, resumed = Progress(None), False
  if progress_dir is not None:
    progress = Progress(files.absolute_path(progress_dir))
    resumed = processes.from_primary(progress.begin, run.identity(), run.fingerprint(logits))
  result = run.cascade(logits, progress, resumed, notes, say or (lambda line: None))
  named = dataclasses.replace(result.cascade, name=ensemble.label(version))
  return result._replace(cascade=named)


class _Run:
  """One evaluation: the images, and the programs that attack them."""

  def __init__(self, key, logits_fn, images, threat, members, size, precision, mesh):
    self.threat, self.members, self.size = threat, members, size
    self.key, self.precision, self.mesh = key, precision, mesh
    self.source = fingerprint.source(logits_fn)
    if not isinstance(logits_fn, Partial) and not hasattr(logits_fn, 'for_images'):
      logits_fn = Partial(logits_fn)
    self.logits_fn = mesh_lib.on_mesh(logits_fn, mesh)
    self.draws = max(member.draws for member in members)
    self.x, self.labels, self.indices = images
    self.orders: dict[Member, np.ndarray] = {}  # int [N, targets]; -1 where it is not yet known

  def identity(self) -> dict[str, Any]:
    """Returns what the result depends on, but for the model."""
    return {
      'attacks': [repr(member) for member in self.members],
      'norm': self.threat.norm,
      'eps': float(self.threat.eps),
      'batch_size': self.size,
      'precision': self.precision,
      'key': [jax.random.key_impl(self.key), *jax.random.key_data(self.key).tolist()],
      'images': _sha256(self.x),
      'labels': _sha256(self.labels),
      'indices': _sha256(self.indices),
      'source of the function': self.source,
      'source of the attacks': fingerprint.source_of_attacks(),
    }

  def fingerprint(self, logits: np.ndarray) -> fingerprint.Fingerprint:
    """Returns what tells the model from others; the gradient is that of the first batch."""
    if all(member.name == 'square' for member in self.members):  # the model may have none
      return {'logits': logits}
    rows = np.arange(min(len(self.x), self.size))
    x = self._batch(rows, np.zeros_like(rows))['x']

    @functools.partial(jax.jit, out_shardings=mesh_lib.replicated(self.mesh))
    def gradient(logits_fn, x, key):
      return fingerprint.gradient(logits_fn, x, key, self.threat, self.draws)

    with jax.default_matmul_precision(self.precision):
      found = gradient(self._logits_fn(rows), x, mesh_lib.put_key(self.key, self.mesh))
    return {'logits': logits, 'gradient': fingerprint.sketch(np.asarray(found)[rows])}

  def _logits_fn(self, rows: np.ndarray) -> Callable[..., jax.Array]:
    """Returns the logits function for a batch of these images, filled up."""
    if not hasattr(self.logits_fn, 'for_images'):
      return self.logits_fn
    return self.logits_fn.for_images(fill_up(rows, self.size)[0])

  def clean_logits(self, rows: np.ndarray) -> np.ndarray:
    """Returns the logits of these images, [n, K]; odds for a stochastic model."""
    program = _clean_program(self.mesh, self.precision, self.draws)
    found, key = [], mesh_lib.put_key(self.key, self.mesh)
    for first in range(0, len(rows), self.size):
      chosen = rows[first : first + self.size]
      batch = self._batch(chosen, np.zeros_like(chosen))
      logits = program(self._logits_fn(chosen), batch['x'], key)
      found.append(np.asarray(logits)[: len(chosen)])
    return np.concatenate(found)

  def cascade(self, logits, progress, resumed, notes, say) -> Result:
    """Runs the attacks one after another on what is still robust."""
    x_adv, robust = self.x.copy(), np.array(losses.correct(logits, self.labels))
    broken_by = np.where(robust, ROBUST, 0)
    names, accuracy, seconds = ['clean'], [float(robust.mean())], [0.0]
    clock, met = Clock(self.members), np.zeros((len(self.members), len(self.x), 4), bool)
    for place, member in enumerate(self.members, 1):
      spent, number, taken_up = 0.0, 0, 0
      for number, runs in enumerate(batches(member, robust, self.size), 1):
        rows = runs.images
        # Should a damaged batch come out otherwise, those after it hold other runs.
        held = zlib.crc32(np.stack([rows, runs.stages]).tobytes())
        name = f'{place:02d}-{member.name}-{number - 1:05d}-{held:08x}'
        outcome = progress.read(name, self.x[rows])
        fresh = not all(processes.gather(outcome is not None))
        if fresh:
          outcome = self._attack(member, runs)
          if processes.is_primary():
            progress.write(name, outcome)
        np.logical_or.at(met[place - 1], rows, outcome.met)
        # Of several stages that break an image the first one counts.
        for run in np.flatnonzero(outcome.broken & robust[rows]):
          if robust[rows[run]]:
            x_adv[rows[run]] = outcome.x_adv[run]
            robust[rows[run]], broken_by[rows[run]] = False, place
        taken_up += not fresh
        spent += outcome.seconds
        clock.finished(member, len(rows), outcome.seconds)
        if fresh and clock.due():
          stage = f' {runs.stages[-1] + 1}/{member.stages}'
          say(
            f'{member.name}{stage * (member.stages > 1)}, {runs.left} runs to go, '
            f'{robust.mean():.1%} robust so far, {clock.left(place - 1, runs.left, robust.sum())}'
          )
      names.append(member.name)
      accuracy.append(float(robust.mean()))
      seconds.append(spent)
      kept = f', {taken_up} of {number} batches taken up' if resumed else ''
      say(f'{accuracy[-1]:.1%} robust after {member.name}, {duration(spent)}{kept}')
    lines = _lines(self.members, met, robust, broken_by)
    for line in lines:
      say(line)
    return Result(
      x_adv,
      robust,
      Cascade(tuple(names), tuple(accuracy), tuple(seconds), broken_by, (*notes, *lines)),
    )

  def _attack(self, member: Member, runs: Runs) -> Outcome:
    started, rows = time.monotonic(), runs.images
    program = _attack_program(member, self.threat.norm, self.mesh, self.precision, self.draws)
    # Its own stream for each attack, the same one in every version.
    stream = jax.random.fold_in(self.key, zlib.crc32(member.name.encode()))
    batch, key = (self._batch(rows, runs.stages), mesh_lib.put_key(stream, self.mesh))
    if member.plans:
      order = fill_up(self._order(member, rows, batch), self.size)[0]
      batch |= mesh_lib.put_whole_batch({'order': order}, self.mesh)
    outputs = program(self._logits_fn(rows), batch, key, np.float32(self.threat.eps))
    x_adv, broken, met = (a[: len(rows)] for a in jax.device_get(outputs))
    x_adv = np.where(broken[:, None, None, None], x_adv, self.x[rows])
    return Outcome(broken, x_adv, time.monotonic() - started, met)

  def _order(self, member: Member, rows: np.ndarray, batch) -> np.ndarray:
    """Returns what the attack aims at in turn, int [b, targets]; found once for an image."""
    unknown = np.full((len(self.x), member.targets), -1, np.int32)
    known = self.orders.setdefault(member, unknown)
    if (known[rows] < 0).any():
      program = _order_program(member, self.threat.norm, self.mesh, self.precision)
      found = program(self._logits_fn(rows), batch['x'], batch['labels'])
      known[rows] = np.asarray(found)[: len(rows)]
    return known[rows]

  def _batch(self, rows: np.ndarray, stages: np.ndarray) -> dict[str, jax.Array]:
    """Returns a batch of the one shape."""
    rows, mask = fill_up(rows, self.size)
    stages, _ = fill_up(stages, self.size)
    return mesh_lib.put_whole_batch(
      {
        'x': self.x[rows],
        'labels': self.labels[rows],
        'index': self.indices[rows],
        'stage': stages.astype(np.int32),
        'mask': mask,
      },
      self.mesh,
    )


def _lines(members: Sequence[Member], met: np.ndarray, robust, broken_by) -> list[str]:
  """Returns what must be said of the attacks; `met` has for each what is in `Outcome`."""
  said = []
  for place, (member, noted) in enumerate(zip(members, met, strict=True), 1):
    *kept, alone = noted.T
    alone = alone & (broken_by == place)
    said += found.lines(member.name, found.Met(*kept), robust=robust, alone=alone)
  return said


@functools.cache
def _clean_program(mesh: Mesh, precision: str, draws: int) -> Callable:
  """Compiles (logits_fn, x, key) -> logits [B, K] on every device."""
  whole, rows = mesh_lib.replicated(mesh), mesh_lib.batch_sharded(mesh)

  def clean(logits_fn, x, key):
    with jax.default_matmul_precision(precision):
      return _classify(logits_fn, x, key, draws)

  return jax.jit(clean, in_shardings=(None, rows, whole), out_shardings=whole)


@functools.cache
def _attack_program(member: Member, norm: str, mesh: Mesh, precision: str, draws: int) -> Callable:
  """Compiles one attack; eps is an argument of the program.

  It returns (x_adv [B, H, W, C], broken [B], met [B, 4] as in `Outcome`). Broken is what a fresh
  forward pass misclassifies, inside the ball.
  """
  whole, rows = mesh_lib.replicated(mesh), mesh_lib.batch_sharded(mesh)

  def attack(logits_fn, batch, stream, eps):
    with jax.default_matmul_precision(precision):
      threat = Threat(norm, eps)
      x, labels, mask = batch['x'], batch['labels'], batch['mask']
      stage = batch['stage']
      fold_in = jax.random.fold_in
      keys = jax.vmap(lambda s, i: fold_in(fold_in(stream, s), i))(stage, batch['index'])
      order = (batch['order'],) if member.plans else ()
      x_adv, met = member.find(stage, keys, logits_fn, x, labels, mask, threat, *order)
      logits = _classify(logits_fn, x_adv, stream, draws)
      inside = threat.distance(x, x_adv) <= threat.reach
      broken = mask & inside & ~losses.correct(logits, labels)
      unknown = ~losses.finite(logits)
      met = met.also(found.Met(logits=unknown))
      return x_adv, broken, jnp.stack([*met, broken & unknown], axis=1)

  sharded = (None, rows, whole, whole)
  return jax.jit(attack, in_shardings=sharded, out_shardings=whole)


@functools.cache
def _order_program(member: Member, norm: str, mesh: Mesh, precision: str) -> Callable:
  """Compiles (logits_fn, x, labels) -> the classes that an attack aims at, [B, targets]."""
  whole, rows = mesh_lib.replicated(mesh), mesh_lib.batch_sharded(mesh)

  def order(logits_fn, x, labels):
    with jax.default_matmul_precision(precision):
      return member.order(logits_fn, x, labels, norm)

  return jax.jit(order, in_shardings=(None, rows, rows), out_shardings=whole)


def _classify(logits_fn, x, key, draws: int) -> jax.Array:
  """Returns logits; of a stochastic model the mean odds over its noise.

  One draw of the noise would let luck break an image.
  """
  if draws == 1:
    return logits_fn(x).astype(jnp.float32)
  keys = jax.random.split(jax.random.fold_in(key, draws), draws)
  odds = jax.lax.map(lambda k: jax.nn.softmax(logits_fn(x, k).astype(jnp.float32)), keys)
  return odds.mean(axis=0)


def _sha256(array: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
