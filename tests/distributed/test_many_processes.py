"""One run over several processes: the same numbers, and a common end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from golden import fake_checkpoint
from safetensors.numpy import save_file

from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
# SGD, since AdamW makes much of rounding in gradients near zero.
SETTINGS = (
  '--config.optimizer.name=sgd',
  '--config.adapter.targets=("query",)',  # less to compile in each process
  '--config.train.steps=6',
  '--config.train.eval_every=3',
  '--config.train.checkpoint_every=2',
  '--config.eval.attacks=("clean","pgd-2","apgd-ce")',
  '--config.eval.num_examples=20',
  '--config.eval.batch_size=16',
  '--peer_timeout=20',
  '--start_timeout=100',
)
# Where what is evaluated at the end is not the point.
CLEAN = '--config.eval.attacks=("clean",)'
WAIT = 900  # seconds, for a run on a busy machine


class Pod:
  """A run of `count` processes on this machine, `devices` each."""

  def __init__(self, command, workdir, count, devices, flags=(), own=None):
    port = free_ports()
    self.processes = []
    for index in range(count):
      arguments = [*command, f'--workdir={workdir}', *flags]
      arguments += (own or {}).get(index, ())
      if count > 1:
        arguments += [
          f'--coordinator=127.0.0.1:{port}',
          f'--num_processes={count}',
          f'--process_id={index}',
        ]
      self.processes.append(
        subprocess.Popen(
          [sys.executable, *arguments],
          cwd=ROOT,
          env={**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices)},
          stderr=subprocess.PIPE,
          text=True,
        )
      )

  def until(self, start):
    """Reads process 0's lines up to one that begins so."""
    for line in self.processes[0].stderr:
      if line.startswith(start):
        return
    raise AssertionError(f'process 0 never said {start!r}')

  def end(self):
    """Returns the exit statuses, and what each process said."""
    try:
      said = [p.communicate(timeout=WAIT)[1] for p in self.processes]
    finally:
      for process in self.processes:
        process.kill()
    return [process.returncode for process in self.processes], said


def free_ports():
  """Returns a port that is free, as is the next one."""
  for _ in range(100):
    with socket.socket() as first, socket.socket() as second:
      first.bind(('', 0))
      port = first.getsockname()[1]
      try:
        second.bind(('', port + 1))
      except (OSError, OverflowError):
        continue
      return port
  raise AssertionError('no two ports in a row are free')


@pytest.fixture(scope='module')
def start(finished, small_command):
  """Starts a pod that trains from the finished run's base."""
  base = f'--config.base.source={finished.workdir / "base"}'

  def start_pod(workdir, count, devices, *flags, own=None):
    return Pod(
      small_command, workdir, count, devices, (base, *SETTINGS, *flags), own
    )

  return start_pod


@pytest.fixture(scope='module')
def alone(start, tmp_path_factory):
  """The run on one process and one device."""
  workdir = tmp_path_factory.mktemp('processes') / 'alone'
  statuses, said = start(workdir, 1, 1).end()
  assert statuses == [0], said
  return workdir


def evaluations(workdir):
  report = json.loads((workdir / 'report.json').read_text())
  return {(e['weights'], e['attack']): e for e in report['evaluations']}


def assert_same_run(workdir, expected):
  """Adapters to rounding, counts and the number of measurements exactly."""
  for which in ('best', 'last'):
    found, metadata = artefact.read_artefact(workdir / which)
    wanted, other = artefact.read_artefact(expected / which)
    assert metadata['base_fingerprint'] == other['base_fingerprint']
    assert metadata['step'] == other['step']
    wanted = trees.named_leaves(wanted)
    for path, leaf in trees.named_leaves(found).items():
      np.testing.assert_allclose(leaf, wanted[path], atol=3e-6, err_msg=path)
  found, wanted = (evaluations(path) for path in (workdir, expected))
  assert len(found) >= 3
  for name, one in found.items():
    for key in ('num_correct', 'examples', 'per_class'):
      assert one[key] == wanted[name][key], name
    if 'verified' in one:
      assert one['verified']['mismatches'] == one['verified']['outside'] == 0
  found, wanted = (
    read_metrics(path / 'metrics.jsonl') for path in (workdir, expected)
  )
  assert [(row['step'], row['kind']) for row in found] == [
    (row['step'], row['kind']) for row in wanted
  ]
  for one, other in zip(found, wanted, strict=True):
    for key in one.keys() & {'loss', 'clean_accuracy', 'robust_accuracy'}:
      assert one[key] == pytest.approx(other[key], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  'count, devices, fsdp', [(1, 8, 4), (2, 2, 2), (4, 1, 1)]
)
def test_any_shape_gives_the_same_run(
  start, alone, tmp_path, count, devices, fsdp
):
  flags = [f'--config.mesh.fsdp={fsdp}', '--config.mesh.shard_from=64']
  if count == 4:  # each compiles for itself
    flags.append(CLEAN)
  statuses, said = start(tmp_path / 'run', count, devices, *flags).end()
  assert statuses == [0] * count, said
  assert_same_run(tmp_path / 'run', alone)
  if count > 1:
    assert said[0].startswith(f'{count} processes on {HOST}\n')
  for other in said[1:]:  # process 0 alone tells of progress
    assert 'step' not in other and 'report' not in other


@pytest.mark.slow
def test_sigterm_to_one_stops_all_and_one_alone_goes_on(start, alone, tmp_path):
  run = tmp_path / 'run'
  pod = start(run, 2, 1, CLEAN)
  pod.until('step 2/6')
  pod.processes[1].send_signal(signal.SIGTERM)
  statuses, said = pod.end()
  assert statuses == [75, 75], said
  assert 'SIGTERM: saved step ' in said[0].splitlines()[-1]
  assert 'Traceback' not in ''.join(said)
  assert not (run / 'last').exists()
  statuses, said = start(run, 1, 2, CLEAN).end()  # on another shape
  assert statuses == [0]
  assert 'resuming at step ' in said[0]
  assert_same_run(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_the_death_of_one_stops_the_other_by_name(start, tmp_path, victim):
  pod = start(tmp_path / 'run', 2, 1, '--config.train.steps=2000')
  pod.until('step 4/')
  killed = time.monotonic()
  pod.processes[victim].kill()
  statuses, said = pod.end()
  assert time.monotonic() - killed < 60
  assert statuses[victim] == -signal.SIGKILL
  other = 1 - victim
  # JAX may abort a process in the instant after the line is out.
  assert statuses[other] in (75, -signal.SIGABRT), said[other]
  assert (
    f'process {victim} ({HOST}) has died; this one, {other} ({HOST}), stops '
    'too; the same command goes on\n'
  ) in said[other]
  saved = [p for p in (tmp_path / 'run/checkpoints').iterdir()]
  assert saved


def test_different_configs_stop_all_by_the_field(start, tmp_path):
  own = {1: ('--config.train.batch_size=32',)}
  statuses, said = start(tmp_path / 'run', 2, 1, own=own).end()
  assert statuses == [2, 2], said
  for one in said:
    assert one.splitlines()[-1] == (
      f'error: process 1 ({HOST}) has another command or version: '
      f'train.batch_size 32, process 0 ({HOST}) has 16; start all with the same'
    )
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_published_base_is_kept_once_for_all(start, tmp_path):
  golden = fake_checkpoint.read('vit-timm-plain')
  folder = tmp_path / 'checkpoint'
  folder.mkdir()
  arrays = fake_checkpoint.weights(golden['shapes'])
  save_file(arrays, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(golden['config']))
  model = {'width': 24, 'depth': 2, 'num_heads': 3, 'mlp_dim': 96}
  model |= {'patch_size': 4, 'pool': 'token'}
  run = tmp_path / 'run'
  statuses, said = start(
    run,
    *(2, 1),
    f'--config.base.source={folder}',
    *(f'--config.model.{name}={value}' for name, value in model.items()),
    '--config.data.image_size=16',
    '--config.train.steps=1',
    '--config.attack.steps=1',
    '--config.eval.validation_attack=clean',
    '--config.eval.attacks=("clean",)',
  ).end()
  assert statuses == [0, 0], said
  assert (run / 'base' / 'load.md').exists()
  metadata = artefact.read_metadata(run / 'best')
  assert metadata['base_source']['layout']
  assert (run / 'report.md').exists()


_OWN_START = """
import sys
import jax
from fulllora_jax import distributed

index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f'127.0.0.1:{port}', 2, index)
distributed.connect(wait=30.0)
print(distributed.gather(index), distributed.is_primary(), flush=True)
distributed.finish()
"""


def test_a_jax_that_is_started_already_is_taken_as_it_is():
  port = str(free_ports())
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _OWN_START, str(index), port],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  said = [process.communicate(timeout=WAIT)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  assert '[0, 1] True' in said[0] and '[0, 1] False' in said[1]


def test_a_coordinator_that_is_not_there(small_command, tmp_path, run_python):
  port = free_ports()
  done = run_python(
    *small_command,
    f'--workdir={tmp_path / "run"}',
    f'--coordinator=127.0.0.1:{port}',
    '--num_processes=2',
    '--process_id=1',
    '--start_timeout=0.5',
  )
  assert done.returncode == 75
  assert done.stderr == (
    f'error: --coordinator: no process 0 at 127.0.0.1 port {port + 1} after '
    '0.5 s: Connection refused; start it, and let this host reach that port\n'
  )
  assert not (tmp_path / 'run').exists()
